"""The examples that judge, each under the plan of the track that judges it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from workers.bounds import DriftBound
from workers.evaluation import Outcome, evaluate
from workers.examples import Encoded
from workers.prefixes import Prefixes
from workers.progress import Clock
from workers.proposals import Proposal
from workers.ranking import Plan
from workers.subject import Subject, Track
from workers.trials import OUTCOME_FIELDS, Trial, completed


class Jury:
    """Judges plans and candidates on the examples of one pool."""

    def __init__(
        self,
        subject: Subject,
        pool: Sequence[Encoded],
        tracks: Sequence[Track],
        result: Track,
        clock: Clock,
        *,
        by_prefix: bool,
    ) -> None:
        """
        Args:
            tracks: those that judge; together they judge each example at most once.
            result: the track whose plan is the result; one of `tracks`, or one more.
            by_prefix: whether block outputs of the tracks' models are kept, from which candidates go on that touch late
                blocks alone. It takes candidates that are all judged on all of a track's examples.
        """
        self.subject = subject
        """With the row blocks that the strategy looked into, once it has."""
        self.pool = pool
        self.tracks = list(tracks)
        self.result = result
        self.all_tracks = self.tracks if result in self.tracks else [*self.tracks, result]
        self.rows = sorted(row for track in self.tracks for row in track.judge)
        """All that judge."""
        self.clock = clock
        self.bound: DriftBound | None = None
        """That no plan of the result exceeds."""
        self._at = {row: k for k, row in enumerate(self.rows)}
        self._by_prefix = by_prefix
        self._recorded: dict[int, tuple[Plan, Prefixes]] = {}

    @property
    def places(self) -> list[list[int]]:
        """For each judging track, where its examples stand in an outcome."""
        return [[self._at[row] for row in track.judge] for track in self.tracks]

    def result_with(self, proposal: Proposal) -> Plan:
        """What the result would be with a candidate."""
        return self.result.plan.union(proposal.addition(len(self.all_tracks) - 1))

    def allowed(self, proposed: Iterable[Proposal], refused: list[Proposal]) -> Iterator[Proposal]:
        """Candidates within the bound; `refused` gets the others."""
        for proposal in proposed:
            if self.bound is None or self.bound.allows(self.result_with(proposal)):
                yield proposal
            else:
                refused.append(proposal)

    def trial(self, proposal: Proposal, rows: Collection[int]) -> Trial:
        """A candidate, judged on some of the rows."""
        plans = [track.plan.union(proposal.addition(k)) for k, track in enumerate(self.tracks)]
        at = self.clock.now()
        return Trial(proposal, plans, self.outcome(plans, rows), self.clock.now() - at)

    def judge_more(self, trial: Trial, rows: Sequence[int]) -> None:
        """Judge a candidate on those of the rows that it was not judged on yet."""
        at = self.clock.now()
        left = [row for row in rows if np.isnan(trial.outcome.loss[self._at[row]])]
        trial.outcome = completed(trial.outcome, self.outcome(trial.plans, left))
        trial.seconds += self.clock.now() - at

    def outcome(self, plans: Sequence[Plan], rows: Collection[int]) -> Outcome:
        """Some of the rows, each under the plan of the track that judges it; NaN for the others.

        Args:
            plans: of each judging track.
        """
        N = len(self.rows)
        wanted = set(rows)
        whole = Outcome(
            loss=np.full(N, np.nan),
            exact=np.full(N, np.nan),
            predicted=np.zeros(N, dtype=np.int64),
            correct=np.full(N, np.nan),
        )
        for track, plan in zip(self.tracks, plans, strict=True):
            mine = [row for row in track.judge if row in wanted]
            if not mine:
                continue
            part = self.evaluate(track, plan, mine)
            where = [self._at[row] for row in mine]
            for field_name in OUTCOME_FIELDS:
                getattr(whole, field_name)[where] = getattr(part, field_name)
        return whole

    def evaluate(self, track: Track, plan: Plan, rows: Sequence[int]) -> Outcome:
        """The model without what a plan removes, on some of the track's examples."""
        subject = self.subject
        changed = [name for name, removed in plan.removed.items() if removed != track.plan.removed.get(name)]
        prefixes = self._prefixes(track) if changed and self._by_prefix else None
        with subject.without(plan):
            if prefixes is not None:
                return prefixes.evaluate(subject.objective, prefixes.first_block(changed))
            encoded = [self.pool[row] for row in rows]
            return evaluate(subject.model, encoded, subject.objective, subject.layout)

    def _prefixes(self, track: Track) -> Prefixes:
        """Block outputs of the track's current model on all examples that it judges."""
        recorded = self._recorded.get(id(track))
        if recorded is None or recorded[0] != track.plan:
            subject = self.subject
            encoded = [self.pool[row] for row in track.judge]
            prefixes = recorded[1] if recorded else Prefixes(subject.model, encoded, subject.layout)
            with subject.without(track.plan):
                prefixes.record(subject.objective)
            recorded = self._recorded[id(track)] = (track.plan, prefixes)
        return recorded[1]

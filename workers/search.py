"""The search: from one backward pass to an accepted plan, and again from there.

Each pass takes effects, has a strategy rank and propose candidates (`workers.proposals`), tries them on examples that
the ranking has not seen, and takes the best if it is better than the current model (`workers.trials`). The default
strategy's are plans of growing size, of which the one of least loss is accepted by a paired test.

Splits are `Track`s. With examples enough there is one: ranked by the gradient split, judged on the selection
split. With few there is one a fold, ranked by the other folds and judged on its own (cross-fitting), and one more
that is ranked by all examples and judged by none: the result. Tracks never see the examples they are judged on,
in later passes neither, since each goes on from its own plan. The first pass needs one backward for all tracks:
effects are per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from service.errors import UnusableModel
from service.jobs import Stage
from service.reports import Candidate, PassReport
from workers.bounds import DriftBound, with_refused
from workers.evaluation import Outcome, paired_p
from workers.examples import Encoded
from workers.gradients import Effects, effects
from workers.jury import Jury
from workers.nested import NestedRound
from workers.progress import Clock
from workers.proposals import Components, Proposal, Proposals, Proposer
from workers.ranking import Plan
from workers.structures import Unit
from workers.subject import Subject, Track
from workers.targets import Target
from workers.trials import Choice, Trial, choose_by_accuracy, choose_by_loss, harms

# A pass that still lowered the loss by this fraction suggests that another would pay.
STILL_FALLING = 0.02


class OnStep(Protocol):
    """Told the kind of work, the pass from 1, the fraction of that work done, and a message."""

    def __call__(self, stage: Stage, number: int, fraction: float, message: str) -> None: ...


def check_finite(base: Outcome, dtype: str) -> None:
    """Raises UnusableModel where the base model itself has no finite loss on some examples."""
    if base.broken:
        raise UnusableModel(f"in {dtype} its loss on some examples is not finite", param="model")


class Search:
    """Passes over one pool of examples."""

    def __init__(
        self,
        subject: Subject,
        pool: Sequence[Encoded],
        tracks: Sequence[Track],
        result: Track,
        proposer: Proposer[Any] | None = None,
        bound: DriftBound | None = None,
    ) -> None:
        """
        Args:
            tracks, result: as a `Jury` takes them.
            proposer: the strategy, `Components` if none is given; `workers.strategies` makes it from a job's options.
            bound: that no accepted plan exceeds; None for none.
        """
        self.ranked_targets = [target for target in subject.targets if target.name in subject.spectra]
        """Those that effects are taken of."""
        self.ranked_units = subject.units
        """And those."""
        self.proposer = Components() if proposer is None else proposer
        self.clock = Clock()
        self.jury = Jury(subject, pool, tracks, result, self.clock, by_prefix=not self.proposer.nested)
        self.jury.bound = bound
        self.pool, self.tracks, self.result = pool, self.jury.tracks, result
        self.all_tracks = self.jury.all_tracks
        self.passes: list[PassReport] = []
        self.plans = [Plan()]
        """The result's plan: of the base, and after each accepted pass."""
        self.outcomes: list[Outcome] = []
        """On the judged examples, in the order of `plans`."""
        self.judging: list[list[Plan]] = [[Plan() for _ in self.tracks]]
        """The plans that these are of, one for each track, in the order of `plans`."""
        self.unreached: dict[str, str] = {}
        """Modules and structures that no gradient has reached, and why."""

    @property
    def subject(self) -> Subject:
        """With the row blocks that the strategy looked into, once it has."""
        return self.jury.subject

    def run(self, passes: int, on_step: OnStep) -> None:
        """Up to `passes` passes; the first that is not accepted is the last."""
        for _ in self.each_pass(passes, on_step):
            pass
        returned = self.result_after(passes)
        for k in range(returned, len(self.plans) - 1):
            self.passes[k] = self.passes[k].model_copy(update={"withdrawn": True})

    def each_pass(self, passes: int, on_step: OnStep) -> Iterator[PassReport]:
        """The same for who looks at what stands after each pass. None is told to be withdrawn."""
        self.begin()
        for number in range(1, passes + 1):
            report, outcome = self.one_pass(number, self.outcomes[-1], on_step)
            self.passes.append(report)
            if report.accepted:
                self.keep(outcome)
            yield report
            if not report.accepted:
                return

    def begin(self) -> None:
        """Judge the base."""
        self.outcomes = [self.judge()]
        check_finite(self.outcomes[0], self.subject.dtype)

    def judge(self) -> Outcome:
        """All judged examples, each under its track's plan."""
        started = self.clock.now()
        outcome = self.jury.outcome([track.plan for track in self.tracks], self.jury.rows)
        self.clock.searching += self.clock.now() - started
        return outcome

    def keep(self, outcome: Outcome) -> None:
        """Go on from the tracks' plans as they are.

        Args:
            outcome: of these plans.
        """
        self.plans.append(self.result.plan)
        self.judging.append([track.plan for track in self.tracks])
        self.outcomes.append(outcome)

    def result_after(self, passes: int) -> int:
        """Which of `plans` a search of so many passes returns: the last, but for those under which fewer answers are
        right than the base's, by more than chance. The loss may fall while a model collapses to one answer, and the
        next pass may mend that, so it ends no search; but what is returned shall not have it."""
        k = min(passes, len(self.plans) - 1)
        while k and self.proposer.nested and harms(self.outcomes[0], self.outcomes[k]):
            k -= 1
        return k

    def judging_plan(self, k: int, row: int) -> Plan:
        """Which plan `outcomes[k]` judges an example of the pool by."""
        return next(plan for track, plan in zip(self.tracks, self.judging[k], strict=True) if row in track.judge)

    def one_pass(self, number: int, current: Outcome, on_step: OnStep) -> tuple[PassReport, Outcome]:
        """One backward, ranking and search from the tracks' plans, which it extends where that helps.

        Args:
            number: from 1.
            current: of the plans as they are, on all judged examples.
        """
        began = self.clock.now()
        before, size_before = current, self.result.plan.size
        loss = float(before.loss.mean())
        ranked = self._rank(number, on_step)
        started = self.clock.now()
        proposals = self.proposer.propose(ranked, [track.plan for track in self.all_tracks], loss)
        decomposing = self.clock.now()
        self.jury.subject = self.subject.with_targets(proposals.blocks)
        decomposed = self.clock.now() - decomposing
        self.clock.decomposing += decomposed

        candidates, choices = self._rounds(proposals, current, partial(on_step, Stage.SEARCHING, number))
        current = choices[-1].outcome
        kept = [choice for choice in choices if choice.kept is not None]
        fall = loss - float(current.loss.mean())
        self.clock.searching += self.clock.now() - started - decomposed
        report = PassReport(
            number=number,
            base_loss=loss,
            candidates=candidates,
            chosen=self.result.plan.size - size_before,
            loss=float(current.loss.mean()),
            p=paired_p(current.loss - before.loss, two_sided=False) if kept else choices[-1].p,
            accepted=bool(kept),
            reason="; ".join(choice.reason for choice in kept or choices[-1:]),
            still_falling=fall > STILL_FALLING * loss,
            seconds=self.clock.now() - began,
        )
        return report, current

    def _rounds(
        self, proposals: Proposals, current: Outcome, on_step: Callable[[float, str], None]
    ) -> tuple[list[Candidate], list[Choice]]:
        """Try a pass's candidates and keep what helps, round after round."""
        candidates: list[Candidate] = []
        choices: list[Choice] = []
        rounds = len(proposals.rounds)
        for k, proposed in enumerate(proposals.rounds):

            def on_trial(fraction: float, message: str, k: int = k) -> None:
                on_step((k + fraction) / rounds, message)

            refused: list[Proposal] = []
            if self.proposer.nested:
                nested = NestedRound(self.jury, current, on_trial)
                trials, refused = nested.run(proposals), nested.refused
            else:
                trials = self._try_all(self.jury.allowed(proposed, refused), len(proposed), on_trial)
            candidates += [trial.report(current) for trial in trials]
            choice = self._choose(trials, current)
            told = with_refused(choice.reason, len(trials), refused, nested=self.proposer.nested)
            choices.append(replace(choice, reason=told))
            for j, (track, pick) in enumerate(zip(self.all_tracks, choices[-1].picks, strict=True)):
                if pick is not None:
                    track.plan = track.plan.union(pick.proposal.addition(j))
            current = choices[-1].outcome
            if sum(choice.kept is not None for choice in choices) == proposals.most_kept:
                break
        return candidates, choices

    def _choose(self, trials: Sequence[Trial], current: Outcome) -> Choice:
        if self.proposer.nested:
            return choose_by_loss(trials, current, len(self.all_tracks))
        return choose_by_accuracy(trials, current, self.jury.places, len(self.all_tracks))

    def _try_all(self, proposals: Iterable[Proposal], most: int, on_trial: Callable[[float, str], None]) -> list[Trial]:
        """Judge every candidate on all examples."""
        trials = []
        for k, proposal in enumerate(proposals):
            on_trial(k / most, f"trying {proposal.description}")
            trials.append(self.jury.trial(proposal, self.jury.rows))
        return trials

    def _rank(self, number: int, on_step: OnStep) -> list[Any]:
        """What the strategy makes of each track, the result's last."""
        on_batch = partial(on_step, Stage.BACKWARD, number, message=f"pass {number}: backward")
        shared: Effects | None = None
        rows = sorted({row for track in self.all_tracks for row in track.fit})
        plans = [track.plan for track in self.all_tracks]
        if number == 1 and plans.count(plans[0]) == len(plans):  # one backward serves every track
            shared = self.backward(rows, plans[0], on_batch)
        ranked = []
        for track in self.all_tracks:
            found = shared
            if found is None and self.proposer.by_effects:
                rows, found = track.fit, self.backward(track.fit, track.plan, on_batch)
            started = self.clock.now()
            on_step(Stage.RANKING, number, 0.0, f"pass {number}: ranking")
            position = {row: k for k, row in enumerate(rows)}
            by_target = {} if found is None else found.by_module
            ranked.append(self.proposer.rank(by_target, [position[row] for row in track.fit], track.plan))
            self.clock.ranking += self.clock.now() - started
        return ranked

    def backward(
        self,
        rows: Sequence[int],
        plan: Plan,
        on_batch: Callable[[float], None],
        *,
        targets: Sequence[Target] | None = None,
        units: Sequence[Unit] | None = None,
    ) -> Effects:
        """The effects on some of the pool's examples, of the model without what a plan removes.

        Args:
            targets, units: what effects are taken of; all that are ranked, where none are given.

        Raises:
            UnusableModel: the base has no finite loss or gradient on some examples.
        """
        subject = self.subject
        started = self.clock.now()
        with subject.without(plan):
            found, unreached = effects(
                subject.model,
                self.ranked_targets if targets is None else targets,
                subject.spectra,
                [self.pool[row] for row in rows],
                subject.objective,
                subject.layout,
                units=self.ranked_units if units is None else units,
                on_batch=on_batch,
            )
        before = {name: why for name, why in self.unreached.items() if name not in found.by_module}
        self.unreached = before | unreached
        self.clock.backward += self.clock.now() - started
        self.clock.fb = self.clock.fb or found.fb_seconds
        finite = found.finite
        if not finite.all():
            if not plan.size:
                raise UnusableModel(
                    f"in {subject.dtype} its loss or its gradient on some examples is not finite", param="model"
                )
            for effect in found.by_module.values():  # of a model that removals broke on an example, nothing is known
                effect[~finite.to(effect.device)] = 0
        return found

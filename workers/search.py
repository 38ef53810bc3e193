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

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from service.errors import UnusableModel
from service.jobs import Objective, Stage
from service.reports import Candidate, PassReport
from workers.bounds import DriftBound
from workers.climbing import beginning, climb
from workers.evaluation import Outcome, evaluate, paired_p
from workers.examples import Encoded, Layout
from workers.gradients import Effects, effects
from workers.prefixes import Prefixes
from workers.progress import Clock
from workers.proposals import Components, Growing, Proposal, Proposals, Proposer, joined
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import Spectrum, decompose
from workers.structures import Unit
from workers.targets import Target
from workers.trials import (
    NEARLY,
    OUTCOME_FIELDS,
    Choice,
    Trial,
    choose_by_accuracy,
    choose_by_loss,
    completed,
    harms,
)

# Candidates are first judged on every fifth example, if that leaves this many, and at most so many on all.
STRIDE = 5
FEWEST_JUDGED = 20
FINALISTS = 5
# Where the second's gain on those is this part of the first's, every fifth of the others tells which is judged on all.
CLOSE = 0.9
# Of a pass's search, told as progress: the part that plans of growing size take.
GROWING_SHARE = 0.6
# A pass that still lowered the loss by this fraction suggests that another would pay.
STILL_FALLING = 0.02


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under adaptation with what does not change: its targets and their components."""

    model: nn.Module
    targets: Sequence[Target]
    spectra: Mapping[str, Spectrum]
    objective: Objective
    layout: Layout
    decompose: Callable[[Tensor], Spectrum] = decompose
    """How more weights are decomposed, row blocks say: from a cache, where there is one."""
    units: Sequence[Unit] = ()
    """Structures beside components."""

    def without(self, plan: Plan) -> AbstractContextManager[None]:
        """The model with what the plan removes gone, for the length of the context."""
        return applied(self.targets, self.spectra, plan, self.units)

    def with_targets(self, more: Sequence[Target]) -> Subject:
        """The same model with more targets, decomposed."""
        new = [target for target in more if target.name not in self.spectra]
        spectra = {target.name: self.decompose(target.weight) for target in new}
        return replace(self, targets=[*self.targets, *new], spectra={**self.spectra, **spectra})

    @property
    def dtype(self) -> str:
        """`float32`, as configurations spell it."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


@dataclass
class Track:
    """One way through the passes. Rows are indices into the pool of encoded examples."""

    fit: list[int]
    judge: list[int]
    plan: Plan = field(default_factory=Plan)


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
            tracks: those that judge; together they judge each example at most once.
            result: the track whose plan is the result; one of `tracks`, or one more.
            proposer: the strategy, `Components` if none is given; `workers.strategies` makes it from a job's options.
            bound: that no accepted plan exceeds; None for none.
        """
        self.subject = subject
        """With the row blocks that the strategy looked into, once it has."""
        self.ranked_targets = [target for target in subject.targets if target.name in subject.spectra]
        """Those that effects are taken of."""
        self.ranked_units = subject.units
        """And those."""
        self.proposer = Components() if proposer is None else proposer
        self.bound = bound
        self.pool = pool
        self.tracks = list(tracks)
        self.result = result
        self.all_tracks = self.tracks if result in self.tracks else [*self.tracks, result]
        self.judged = sorted(row for track in self.tracks for row in track.judge)
        self.clock = Clock()
        self.passes: list[PassReport] = []
        self.plans = [Plan()]
        """The result's plan: of the base, and after each accepted pass."""
        self.outcomes: list[Outcome] = []
        """On the judged examples, in the order of `plans`."""
        self.judging: list[list[Plan]] = [[Plan() for _ in self.tracks]]
        """The plans that these are of, one for each track, in the order of `plans`."""
        self._recorded: dict[int, tuple[Plan, Prefixes]] = {}
        self.unreached: dict[str, str] = {}
        """Modules and structures that no gradient has reached, and why."""

    def run(self, passes: int, on_step: OnStep) -> None:
        """Up to `passes` passes; the first that is not accepted is the last."""
        self.begin()
        for number in range(1, passes + 1):
            report, outcome = self.one_pass(number, self.outcomes[-1], on_step)
            self.passes.append(report)
            if not report.accepted:
                break
            self.keep(outcome)
        returned = self.result_after(passes)
        for k in range(returned, len(self.plans) - 1):
            self.passes[k] = self.passes[k].model_copy(update={"withdrawn": True})

    def begin(self) -> None:
        """Judge the base."""
        self.outcomes = [self.judge()]
        check_finite(self.outcomes[0], self.subject.dtype)

    def judge(self) -> Outcome:
        """All judged examples, each under its track's plan."""
        started = self.clock.now()
        outcome = self._judge([track.plan for track in self.tracks], self.judged)
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
        self.subject = self.subject.with_targets(proposals.blocks)
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
                trials = self._try_nested(proposals, current, on_trial, refused)
            else:
                trials = self._try_all(self._allowed(proposed, refused), len(proposed), current, on_trial)
            candidates += [trial.report(current) for trial in trials]
            choice = self._choose(trials, current)
            choices.append(replace(choice, reason=_with_refused(choice.reason, trials, refused)))
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
        at = {row: k for k, row in enumerate(self.judged)}
        judged = [[at[row] for row in track.judge] for track in self.tracks]
        return choose_by_accuracy(trials, current, judged, len(self.all_tracks))

    def _allowed(self, proposed: Iterable[Proposal], refused: list[Proposal]) -> Iterator[Proposal]:
        for proposal in proposed:
            if self.bound is None or self.bound.allows(self._result_with(proposal)):
                yield proposal
            else:
                refused.append(proposal)

    def _result_with(self, proposal: Proposal) -> Plan:
        return self.result.plan.union(proposal.addition(len(self.all_tracks) - 1))

    def _try_nested(
        self,
        proposals: Proposals,
        current: Outcome,
        on_trial: Callable[[float, str], None],
        refused: list[Proposal],
    ) -> list[Trial]:
        """Judge plans of growing size, and the best of them with single components beside, first on a few of the
        examples, the finalists on all. `refused` gets what is over the bound."""
        few = self._few(current)
        rest = sorted(set(self.judged) - set(few))
        trials: list[Trial] = []
        lists = len(proposals.lists)
        for k, growing in enumerate(proposals.lists):

            def on_size(fraction: float, message: str, k: int = k) -> None:
                on_trial(GROWING_SHARE * (k + fraction) / lists, message)

            best = _best(trials, current)
            trials += self._grow(growing, best.proposal.size if best else None, few, current, on_size, refused)
        contenders = list(trials)
        for single in proposals.singles:
            best = _best(contenders, current)
            proposal = joined(single, best.proposal) if best else single
            on_trial(GROWING_SHARE, f"trying without {proposal.description}")
            for allowed in self._allowed([proposal], []):
                trials.append(self._trial(allowed, few))
                contenders.append(trials[-1])
                if best:  # one of two plans that differ by a component is enough to be judged on all examples
                    contenders.remove(min(trials[-1], best, key=lambda trial: trial.gain(current)))
        if rest:
            self._finish(contenders, rest, current, on_trial)
        return trials

    def _finish(
        self,
        trials: Sequence[Trial],
        rest: Sequence[int],
        current: Outcome,
        on_trial: Callable[[float, str], None],
    ) -> None:
        """Judge those that gain most on a few examples on the others as well: the best of them, of two that are close
        the smaller if the larger is not clearly better, and others as long as none would be accepted. Where two have
        failed, it was by going too far on too few examples: the next is half as large. So is one that is tried in
        place of one that costs right answers."""
        gains = {id(trial): trial.gain(current) for trial in trials}  # a trial's own changes with what it is judged on
        left = sorted((t for t in trials if gains[id(t)] > 0), key=lambda t: -gains[id(t)])
        if len(left) > 1 and gains[id(left[1])] >= CLOSE * gains[id(left[0])]:
            for trial in left[:2]:
                self._judge_more(trial, rest[::STRIDE])
            small, large = sorted(left[:2], key=lambda t: t.proposal.size)
            left[:2] = (large, small) if large.clearly_better(small, current) else (small, large)
        least = 0.0
        for k in range(FINALISTS):
            if not left:
                break
            trial = left.pop(0)
            done = GROWING_SHARE + (1 - GROWING_SHARE) * k / FINALISTS
            on_trial(done, f"judging {trial.proposal.description} on all examples")
            self._judge_more(trial, rest)
            falls = trial.falls(current)
            if falls and not trial.suspect(current):
                break
            if falls:
                least = least or NEARLY * gains[id(trial)]
            if k or least:
                half = trial.proposal.size / 2
                left = [t for t in left if t.proposal.size <= half and gains[id(t)] >= least]

    def _judge_more(self, trial: Trial, rows: Sequence[int]) -> None:
        """Judge a trial on those of the rows that it was not judged on yet."""
        at = self.clock.now()
        there = ~np.isnan(trial.outcome.loss)
        done = {row for row, judged in zip(self.judged, there, strict=True) if judged}
        trial.outcome = completed(trial.outcome, self._judge(trial.plans, [row for row in rows if row not in done]))
        trial.seconds += self.clock.now() - at

    def _grow(
        self,
        growing: Growing,
        earlier: int | None,
        few: Sequence[int],
        current: Outcome,
        on_size: Callable[[float, str], None],
        refused: list[Proposal],
    ) -> list[Trial]:
        """Judge plans of growing size on a few examples, a little beyond the best. `earlier` is the best size of the
        list before."""
        grid = growing.candidates
        begin = beginning([proposal.size for proposal in grid], earlier) if grid else 0
        up: Iterable[Proposal] = grid[begin:]
        over: list[Proposal] = []
        if self.bound is not None:
            up = self.bound.within(grid[begin:], growing.of_size, self._result_with, over)
        trials: list[Trial] = []

        def gain_of(proposal: Proposal) -> float:
            on_size(min(len(trials) / len(grid), 1.0), f"trying without {proposal.description}")
            trials.append(self._trial(proposal, few))
            return trials[-1].gain(current)

        # The bound may have made the first of them smaller than some of the grid.
        smaller = (proposal for proposal in reversed(grid[:begin]) if proposal.size < trials[0].proposal.size)
        climb(up, self._allowed(smaller, []), gain_of)
        refused += over
        return trials

    def _few(self, current: Outcome) -> list[int]:
        """Those of the judged examples that candidates are first judged on: evenly from all in the order of their
        answers, then of their loss, so that every label has its share. Of examples of one label a model that knows
        no other answer is the best."""
        step = max(1, min(STRIDE, len(self.judged) // FEWEST_JUDGED))
        answers = [self.pool[row].labels[self.pool[row].gold] for row in self.judged]
        often = Counter(answers)

        def place(k: int) -> tuple[str, float]:
            return answers[k] if often[answers[k]] > 1 else "", float(current.loss[k])

        ordered = sorted(range(len(self.judged)), key=place)
        return sorted(self.judged[k] for k in ordered[step // 2 :: step])

    def _try_all(
        self, proposals: Iterable[Proposal], most: int, current: Outcome, on_trial: Callable[[float, str], None]
    ) -> list[Trial]:
        """Judge every candidate on all examples."""
        trials = []
        for k, proposal in enumerate(proposals):
            on_trial(k / most, f"trying {proposal.description}")
            trials.append(self._trial(proposal, self.judged))
        return trials

    def _trial(self, proposal: Proposal, rows: Collection[int]) -> Trial:
        plans = [track.plan.union(proposal.addition(k)) for k, track in enumerate(self.tracks)]
        at = self.clock.now()
        return Trial(proposal, plans, self._judge(plans, rows), self.clock.now() - at)

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

    def _judge(self, plans: Sequence[Plan], rows: Collection[int]) -> Outcome:
        """Some of the judged examples, each under the plan of the track that judges it; NaN for the others."""
        N = len(self.judged)
        wanted = set(rows)
        at = {row: k for k, row in enumerate(self.judged)}
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
            part = self._evaluate(track, plan, mine)
            where = [at[row] for row in mine]
            for field_name in OUTCOME_FIELDS:
                getattr(whole, field_name)[where] = getattr(part, field_name)
        return whole

    def _evaluate(self, track: Track, plan: Plan, rows: Sequence[int]) -> Outcome:
        """The model without the plan's components on some of the track's examples."""
        subject = self.subject
        changed = [name for name, removed in plan.removed.items() if removed != track.plan.removed.get(name)]
        # A plan of a whole list touches early blocks too, and is judged on few examples at first.
        prefixes = self._prefixes(track) if changed and not self.proposer.nested else None
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


def _best(trials: Sequence[Trial], current: Outcome) -> Trial | None:
    """The one that gains most, if any gains."""
    best = max(trials, key=lambda trial: trial.gain(current), default=None)
    return best if best is not None and best.gain(current) > 0 else None


def _with_refused(reason: str, trials: Sequence[Trial], refused: Sequence[Proposal]) -> str:
    if not refused:
        return reason
    if not trials:
        return "the least that could be removed would take the drift over max_drift"
    return f"{reason}; removing {refused[-1].description} would take the drift over max_drift"

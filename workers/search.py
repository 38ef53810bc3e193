"""The search: from one backward pass to an accepted plan, and again from there.

Each pass takes effects, ranks, tries plans of growing size on examples that the ranking has not seen, keeps the
one of least loss, and accepts it if its loss is lower than the current model's by a paired test.

Splits are `Track`s. With examples enough there is one: ranked by the gradient split, judged on the selection
split. With few there is one a fold, ranked by the other folds and judged on its own (cross-fitting), and one more
that is ranked by all examples and judged by none: the result. Tracks never see the examples they are judged on,
in later passes neither, since each goes on from its own plan. The first pass needs one backward for all tracks:
effects are per example.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from torch import nn

from service.errors import UnusableModel
from service.jobs import Objective, Stage
from service.reports import Candidate, PassReport
from workers.evaluation import Outcome, evaluate, paired_p
from workers.examples import Encoded, Layout
from workers.gradients import Effects, effects
from workers.progress import Clock
from workers.pruning import applied
from workers.ranking import Plan, Ranking, rank, sizes
from workers.spectrum import Spectrum
from workers.targets import Target

# A pass is accepted if the paired, one-sided t-test on the selection losses gives a p below this: stricter than .05,
# since the best of several plans is tested, and not Bonferroni's, since the plans are nested and fare alike.
SIGNIFICANCE = 0.02
OUTCOME_FIELDS = ("loss", "exact", "predicted", "correct")
# Sizes tried beyond the best so far before a pass ends: the loss is not always convex in the size.
PATIENCE = 2
# Candidates are first judged on every fourth example, if that leaves this many, and the best two on all.
STRIDE = 4
FEWEST_JUDGED = 24
FINALISTS = 2
# Where `max_drift` ends a grid, the sizes between are halved this often, and on until one is allowed.
BISECTIONS = 2
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


@dataclass
class Trial:
    """One candidate of a pass."""

    size: int
    plans: list[Plan]
    """For each judging track."""
    outcome: Outcome
    """NaN for examples that it was not judged on."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether it was judged on all examples."""
        return not np.isnan(self.outcome.loss).any()

    def gain(self, current: Outcome) -> float:
        """By how much its mean loss is lower than the current model's, on the examples that it was judged on."""
        return float(np.nanmean(current.loss - self.outcome.loss))


@dataclass(frozen=True)
class DriftBound:
    """`max_drift`. It binds the result's plan alone, whole, from the base: the plans of other tracks are returned to
    nobody and only estimate what the result is worth."""

    drift: Callable[[Plan], float]
    most: float

    def within(self, grid: Sequence[int], plan_of: Callable[[int], Plan], refused: list[int]) -> Iterator[int]:
        """The sizes that are allowed, measured as they are asked for: the grid's, up to the first that is over, and
        the largest found between the last two. Drift grows with size, all but always.

        Args:
            refused: what is over is added here, so that the last of it is the least.
        """
        last = 0
        for size in grid:
            if self.drift(plan_of(size)) > self.most:
                refused.append(size)
                break
            yield size
            last = size
        if not refused:
            return
        allowed, halved = last, 0
        while refused[-1] - allowed > 1 and (halved < BISECTIONS or not allowed):
            middle, halved = (allowed + refused[-1]) // 2, halved + 1
            if self.drift(plan_of(middle)) > self.most:
                refused.append(middle)
            else:
                allowed = middle
        if allowed > last:
            yield allowed


class OnStep(Protocol):
    """Told the kind of work, the pass from 1, the fraction of that work done, and a message."""

    def __call__(self, stage: Stage, number: int, fraction: float, message: str) -> None: ...


class Search:
    """Passes over one pool of examples."""

    def __init__(
        self,
        subject: Subject,
        pool: Sequence[Encoded],
        tracks: Sequence[Track],
        result: Track,
        bound: DriftBound | None = None,
    ) -> None:
        """
        Args:
            tracks: those that judge; together they judge each example at most once.
            result: the track whose plan is the result; one of `tracks`, or one more.
            bound: that no accepted plan exceeds; None for none.
        """
        self.subject = subject
        self.pool = pool
        self.tracks = list(tracks)
        self.result = result
        self.bound = bound
        self.all_tracks = self.tracks if result in self.tracks else [*self.tracks, result]
        self.judged = sorted(row for track in self.tracks for row in track.judge)
        self.clock = Clock()
        self.passes: list[PassReport] = []
        self.plans = [Plan()]
        """The result's plan: of the base, and after each accepted pass."""
        self.outcomes: list[Outcome] = []
        """On the judged examples, in the order of `plans`."""
        self.unreached: dict[str, str] = {}
        """Modules that no gradient reached, and why."""

    def run(self, passes: int, on_step: OnStep) -> None:
        """Up to `passes` passes; the first that is not accepted is the last."""
        started = time.perf_counter()
        self.outcomes = [self._judge([track.plan for track in self.tracks], self.judged)]
        self.clock.searching += time.perf_counter() - started
        if not np.isfinite(self.outcomes[0].loss).all():
            raise UnusableModel(f"in {self.subject.dtype} its loss on some examples is not finite", param="model")
        for number in range(1, passes + 1):
            report, outcome = self._one_pass(number, self.outcomes[-1], on_step)
            self.passes.append(report)
            if not report.accepted:
                return
            self.plans.append(self.result.plan)
            self.outcomes.append(outcome)

    def _one_pass(self, number: int, current: Outcome, on_step: OnStep) -> tuple[PassReport, Outcome]:
        began = time.perf_counter()
        rankings = self._rank(number, on_step)
        started = time.perf_counter()
        loss = float(current.loss.mean())
        grid, refused = sizes(rankings[-1], loss), list[int]()
        trials = self._try(rankings, current, grid, partial(on_step, Stage.SEARCHING, number), refused)
        best = max(trials, key=lambda trial: (trial.complete, trial.gain(current)), default=None)
        p = 1.0
        if best is not None and best.complete and best.gain(current) > 0:
            p = paired_p(best.outcome.loss - current.loss, two_sided=False)
        accepted = best is not None and p < SIGNIFICANCE
        chosen, outcome = (best.size, best.outcome) if best is not None and accepted else (0, current)
        for track, ranking in zip(self.all_tracks, rankings, strict=True):
            track.plan = track.plan.union(ranking.first(chosen))
        fall = loss - float(outcome.loss.mean())
        self.clock.searching += time.perf_counter() - started
        report = PassReport(
            number=number,
            base_loss=loss,
            candidates=[_candidate(trial, rankings[-1], current) for trial in trials],
            chosen=chosen,
            loss=float(outcome.loss.mean()),
            p=p,
            accepted=accepted,
            reason=_reason(trials, chosen, p, refused),
            still_falling=fall > STILL_FALLING * loss,
            seconds=time.perf_counter() - began,
        )
        return report, outcome

    def _try(
        self,
        rankings: Sequence[Ranking],
        current: Outcome,
        grid: Sequence[int],
        on_trial: Callable[[float, str], None],
        refused: list[int],
    ) -> list[Trial]:
        """Judge plans of growing size, first on a few of the examples, the finalists on all. `refused` gets the
        sizes whose drift is over the bound."""
        allowed: Iterable[int] = grid
        if self.bound is not None:
            allowed = self.bound.within(grid, lambda n: self.result.plan.union(rankings[-1].first(n)), refused)
        stride = max(1, min(STRIDE, len(self.judged) // FEWEST_JUDGED))
        few, rest = self.judged[::stride], [row for k, row in enumerate(self.judged) if k % stride]
        trials: list[Trial] = []
        for k, n in enumerate(allowed):
            on_trial(k / (len(grid) + FINALISTS), f"trying without {n} components")
            plans = [track.plan.union(r.first(n)) for track, r in zip(self.tracks, rankings, strict=False)]
            at = time.perf_counter()
            trials.append(Trial(n, plans, self._judge(plans, few), time.perf_counter() - at))
            best = max(range(len(trials)), key=lambda j: trials[j].gain(current))
            if trials[best].gain(current) > 0 and len(trials) - 1 - best >= PATIENCE:
                break
        finalists = sorted(trials, key=lambda trial: -trial.gain(current))[:FINALISTS] if rest else []
        for k, trial in enumerate(finalists):
            on_trial((len(grid) + k) / (len(grid) + FINALISTS), f"judging {trial.size} components on all examples")
            at = time.perf_counter()
            trial.outcome = _merge(trial.outcome, self._judge(trial.plans, rest))
            trial.seconds += time.perf_counter() - at
        return trials

    def _rank(self, number: int, on_step: OnStep) -> list[Ranking]:
        """A ranking for each track, the result's last."""
        on_batch = partial(on_step, Stage.BACKWARD, number, message=f"pass {number}: backward")
        shared: Effects | None = None
        rows = sorted({row for track in self.all_tracks for row in track.fit})
        if number == 1:  # all plans are empty: one backward serves every track
            shared = self._backward(rows, Plan(), on_batch)
        rankings = []
        for track in self.all_tracks:
            found = shared
            if found is None:
                rows, found = track.fit, self._backward(track.fit, track.plan, on_batch)
            started = time.perf_counter()
            on_step(Stage.RANKING, number, 0.0, f"pass {number}: ranking")
            position = {row: k for k, row in enumerate(rows)}
            rankings.append(rank(found.by_module, [position[row] for row in track.fit], track.plan))
            self.clock.ranking += time.perf_counter() - started
        return rankings

    def _backward(self, rows: Sequence[int], plan: Plan, on_batch: Callable[[float], None]) -> Effects:
        """The effects on some of the pool's examples, of the model without the plan's components."""
        subject = self.subject
        started = time.perf_counter()
        with applied(subject.targets, subject.spectra, plan):
            found, self.unreached = effects(
                subject.model,
                subject.targets,
                subject.spectra,
                [self.pool[row] for row in rows],
                subject.objective,
                subject.layout,
                on_batch=on_batch,
            )
        self.clock.backward += time.perf_counter() - started
        self.clock.fb = self.clock.fb or found.fb_seconds
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
            with applied(self.subject.targets, self.subject.spectra, plan):
                encoded = [self.pool[row] for row in mine]
                part = evaluate(self.subject.model, encoded, self.subject.objective, self.subject.layout)
            where = [at[row] for row in mine]
            for field_name in OUTCOME_FIELDS:
                getattr(whole, field_name)[where] = getattr(part, field_name)
        return whole


def _merge(first: Outcome, second: Outcome) -> Outcome:
    """Two outcomes on different examples as one."""
    missing = np.isnan(first.loss)
    return Outcome(*(np.where(missing, getattr(second, f), getattr(first, f)) for f in OUTCOME_FIELDS))


def _candidate(trial: Trial, ranking: Ranking, current: Outcome) -> Candidate:
    judged = ~np.isnan(trial.outcome.loss)
    correct = trial.outcome.correct[judged]
    closed = correct[~np.isnan(correct)]
    return Candidate(
        size=trial.size,
        examples=int(judged.sum()),
        base_loss=float(current.loss[judged].mean()),
        predicted_loss=float(current.loss[judged].mean()) - float(ranking.predicted[trial.size - 1]),
        loss=float(trial.outcome.loss[judged].mean()),
        accuracy=float(closed.mean()) if closed.size else None,
        exact_match=float(trial.outcome.exact[judged].mean()),
        seconds=trial.seconds,
    )


def _reason(trials: Sequence[Trial], chosen: int, p: float, refused: Sequence[int]) -> str:
    if refused and not trials:
        return "removing one component more would take the drift over max_drift"
    stopped = f"; removing {refused[-1]} would take the drift over max_drift" if refused else ""
    return _judgement(trials, chosen, p) + stopped


def _judgement(trials: Sequence[Trial], chosen: int, p: float) -> str:
    if not trials:
        return "no component has a harmful effect that stands out"
    if chosen:
        return f"removing {chosen} components lowered the selection loss (p = {p:.2g})"
    if p == 1.0:
        return "no candidate lowered the selection loss"
    return f"the best candidate's fall in selection loss is not significant (p = {p:.3f})"

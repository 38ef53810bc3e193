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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import nn

from service.jobs import Candidate, Objective, PassReport, Stage
from workers.evaluation import Outcome, evaluate, paired_p
from workers.examples import Encoded, Layout
from workers.gradients import Effects, effects
from workers.progress import Clock
from workers.pruning import applied
from workers.ranking import Plan, Ranking, rank, sizes
from workers.spectrum import Spectrum
from workers.targets import Target

# A pass is accepted if the paired, one-sided t-test on the selection losses gives a p below this, after it was
# multiplied by the number of candidates that the best was chosen from (Bonferroni).
SIGNIFICANCE = 0.05
# Sizes tried beyond the best so far before a pass ends: the loss is not always convex in the size.
PATIENCE = 2
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


@dataclass
class Track:
    """One way through the passes. Rows are indices into the pool of encoded examples."""

    fit: list[int]
    judge: list[int]
    plan: Plan = field(default_factory=Plan)


class OnStep(Protocol):
    """Told the kind of work, the pass from 1, the fraction of that work done, and a message."""

    def __call__(self, stage: Stage, number: int, fraction: float, message: str) -> None: ...


class Search:
    """Passes over one pool of examples."""

    def __init__(self, subject: Subject, pool: Sequence[Encoded], tracks: Sequence[Track], result: Track) -> None:
        """
        Args:
            tracks: those that judge; together they judge each example at most once.
            result: the track whose plan is the result; one of `tracks`, or one more.
        """
        self.subject = subject
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
        self.unreached: dict[str, str] = {}
        """Modules that no gradient reached, and why."""

    def run(self, passes: int, on_step: OnStep) -> None:
        """Up to `passes` passes; the first that is not accepted is the last."""
        started = time.perf_counter()
        self.outcomes = [self._judge([track.plan for track in self.tracks])]
        self.clock.searching += time.perf_counter() - started
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
        loss = float(current.loss.mean())
        candidates: list[Candidate] = []
        best, best_n = current, 0
        started = time.perf_counter()
        tried = sizes(rankings[-1], loss)
        since_best = 0
        for k, n in enumerate(tried):
            on_step(Stage.SEARCHING, number, k / len(tried), f"pass {number}: trying without {n} components")
            at = time.perf_counter()
            outcome = self._judge(
                [track.plan.union(r.first(n)) for track, r in zip(self.tracks, rankings, strict=False)]
            )
            candidates.append(_candidate(n, rankings[-1], outcome, loss, time.perf_counter() - at))
            if outcome.loss.mean() < best.loss.mean():
                best, best_n, since_best = outcome, n, 0
            else:
                since_best += 1
                if since_best == PATIENCE:
                    break
        p = min(1.0, paired_p(best.loss - current.loss, two_sided=False) * len(candidates))
        accepted = best_n > 0 and p < SIGNIFICANCE
        if accepted:
            for track, ranking in zip(self.all_tracks, rankings, strict=True):
                track.plan = track.plan.union(ranking.first(best_n))
        self.clock.searching += time.perf_counter() - started
        report = PassReport(
            number=number,
            base_loss=loss,
            candidates=candidates,
            chosen=best_n if accepted else 0,
            loss=float(best.loss.mean()) if accepted else loss,
            p=p,
            accepted=accepted,
            reason=_reason(candidates, best_n, p),
            still_falling=accepted and (loss - float(best.loss.mean())) > STILL_FALLING * loss,
            seconds=time.perf_counter() - began,
        )
        return report, best

    def _rank(self, number: int, on_step: OnStep) -> list[Ranking]:
        """A ranking for each track, the result's last."""
        found: dict[int, Effects] = {}
        rankings = []
        shared = number == 1  # all plans are empty: one backward serves every track
        for track in self.all_tracks:
            rows = sorted({r for t in self.all_tracks for r in t.fit}) if shared else track.fit
            if not shared or not found:
                at = time.perf_counter()
                with applied(self.subject.targets, self.subject.spectra, track.plan):
                    found[0], self.unreached = effects(
                        self.subject.model,
                        self.subject.targets,
                        self.subject.spectra,
                        [self.pool[r] for r in rows],
                        self.subject.objective,
                        self.subject.layout,
                        on_batch=lambda done: on_step(Stage.BACKWARD, number, done, f"pass {number}: backward"),
                    )
                self.clock.backward += time.perf_counter() - at
                self.clock.fb = self.clock.fb or found[0].fb_seconds
            at = time.perf_counter()
            on_step(Stage.RANKING, number, 0.0, f"pass {number}: ranking")
            position = {row: k for k, row in enumerate(rows)}
            rankings.append(rank(found[0].by_module, [position[r] for r in track.fit], track.plan))
            self.clock.ranking += time.perf_counter() - at
        return rankings

    def _judge(self, plans: Sequence[Plan]) -> Outcome:
        """The judged examples, in order of their rows, each under the plan of the track that judges it."""
        parts: list[Outcome] = []
        rows: list[int] = []
        for track, plan in zip(self.tracks, plans, strict=True):
            with applied(self.subject.targets, self.subject.spectra, plan):
                judged = [self.pool[r] for r in track.judge]
                parts.append(evaluate(self.subject.model, judged, self.subject.objective, self.subject.layout))
            rows += track.judge
        order = np.argsort(rows)
        return Outcome(
            loss=np.concatenate([part.loss for part in parts])[order],
            exact=np.concatenate([part.exact for part in parts])[order],
            predicted=np.concatenate([part.predicted for part in parts])[order],
            correct=np.concatenate([part.correct for part in parts])[order],
        )


def _candidate(n: int, ranking: Ranking, outcome: Outcome, loss: float, seconds: float) -> Candidate:
    closed = outcome.correct[~np.isnan(outcome.correct)]
    return Candidate(
        size=n,
        predicted_loss=loss - float(ranking.predicted[n - 1]),
        loss=float(outcome.loss.mean()),
        accuracy=float(closed.mean()) if closed.size else None,
        exact_match=float(outcome.exact.mean()),
        seconds=seconds,
    )


def _reason(candidates: Sequence[Candidate], best: int, p: float) -> str:
    if not candidates:
        return "no component has a harmful effect that stands out"
    if not best:
        return "no candidate lowered the selection loss"
    if p >= SIGNIFICANCE:
        return f"the best candidate's fall in selection loss is not significant (p = {p:.3f})"
    return f"removing {best} lowered the selection loss (p = {p:.2g})"

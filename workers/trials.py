"""Candidates that were tried, and which of them is taken: by loss and a test, or by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.reports import Candidate
from workers.evaluation import Outcome, changes, mcnemar_p, paired_p
from workers.proposals import Proposal
from workers.ranking import Plan

# A pass is accepted if the paired, one-sided t-test on the selection losses gives a p below this. The best of several
# plans is tested, but they are nested and fare alike, and what is accepted here is tested again on the test split.
SIGNIFICANCE = 0.05
# What is returned must not have fewer answers right than the base, at this p. A harm is to be ruled out, not proved.
HARM = 0.1
# A candidate that has fewer right than the current model, at this p, gives way to one that has not and gains at least
# this part as much: harm comes by going too far, and where nothing is to be learnt all plans gain about the same.
SUSPICION = 0.25
NEARLY = 0.8
Rows = npt.NDArray[np.intp]
OUTCOME_FIELDS = ("loss", "exact", "predicted", "correct")


@dataclass
class Trial:
    """One candidate of a pass."""

    proposal: Proposal
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

    def clearly_better(self, other: Trial, current: Outcome) -> bool:
        """Whether its loss is lower by more than the standard error of the difference, on the examples that both were
        judged on: the rule by which of two models about as good the simpler is taken (Breiman et al., Classification
        and Regression Trees, 1984)."""
        with np.errstate(invalid="ignore"):
            lower = other.outcome.loss - self.outcome.loss
        lower = lower[~np.isnan(lower)]
        if not np.isfinite(lower).all() or len(lower) < 2:
            return self.gain(current) > other.gain(current)
        return bool(lower.mean() > lower.std(ddof=1) / len(lower) ** 0.5)

    def falls(self, current: Outcome) -> bool:
        """Whether the loss falls significantly, on all examples."""
        return self.p(current) < SIGNIFICANCE

    def suspect(self, current: Outcome) -> bool:
        """Whether fewer answers seem right than the current model's."""
        return harms(current, self.outcome, SUSPICION)

    def p(self, current: Outcome) -> float:
        """Of the paired, one-sided test that the loss falls; 1 where it does not, or not all examples are judged."""
        if not self.complete or self.gain(current) <= 0:
            return 1.0
        return paired_p(self.outcome.loss - current.loss, two_sided=False)

    def report(self, current: Outcome) -> Candidate:
        """What is told of it, beside the model that it was tried on."""
        judged = ~np.isnan(self.outcome.loss)
        base_loss = float(current.loss[judged].mean())
        fall = self.proposal.fall
        return Candidate(
            description=self.proposal.description,
            size=self.proposal.size,
            examples=int(judged.sum()),
            base_loss=base_loss,
            predicted_loss=None if fall is None else base_loss - fall,
            loss=None if np.isinf(self.outcome.loss).any() else float(self.outcome.loss[judged].mean()),
            accuracy=self.outcome.accuracy,
            exact_match=float(self.outcome.exact[judged].mean()),
            seconds=self.seconds,
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """What is taken of one round of candidates."""

    picks: list[Trial | None]
    """For each track, the result's last; all None if nothing is taken."""
    outcome: Outcome
    """On the judged examples, each under what its own track has taken."""
    p: float
    """Of the paired test that the loss fell."""
    reason: str

    @property
    def kept(self) -> Trial | None:
        """What the result takes."""
        return self.picks[-1]


def choose_by_loss(trials: Sequence[Trial], current: Outcome, tracks: int) -> Choice:
    """The least loss among those judged on all examples whose fall is significant, for all tracks; in place of one
    that costs right answers one that gains nearly as much and does not."""

    def merit(trial: Trial) -> tuple[bool, bool, float]:
        return trial.complete, trial.falls(current), trial.gain(current)

    best = max(trials, key=merit, default=None)
    if best is not None and best.falls(current) and best.suspect(current):
        least = NEARLY * best.gain(current)
        safe = [t for t in trials if t.falls(current) and t.gain(current) >= least and not t.suspect(current)]
        best = max(safe, key=merit, default=best)
    p = 1.0 if best is None else best.p(current)
    if best is not None and best.falls(current):
        reason = f"removing {best.proposal.description} lowered the selection loss (p = {p:.2g})"
        return Choice([best] * tracks, best.outcome, p, reason)
    if best is None:
        reason = "no component has a harmful effect that stands out"
    elif p == 1.0:
        reason = "no candidate lowered the selection loss"
    else:
        reason = f"the best candidate's fall in selection loss is not significant (p = {p:.3f})"
    return Choice([None] * tracks, current, p, reason)


def harms(base: Outcome, other: Outcome, at: float = HARM) -> bool:
    """Whether fewer answers are right, over the choices or to the letter, by a one-sided McNemar test with a p below
    `at`."""
    closed = ~np.isnan(base.correct)
    for before, after in ((base.exact, other.exact), (base.correct[closed], other.correct[closed])):
        gained, lost = changes(before, after)
        if lost > gained and mcnemar_p(gained, lost) / 2 < at:
            return True
    return False


def choose_by_accuracy(
    trials: Sequence[Trial], current: Outcome, judged: Sequence[Sequence[int]], tracks: int
) -> Choice:
    """The highest accuracy, then the least loss, if that is better than the current model: the papers' rule, which
    asks for no significance.

    The best of hundreds is best by luck too. So where there are folds, each track takes what is best on the others'
    examples, and its own show what that is worth.

    Args:
        trials: all of them judged on all examples.
        judged: of each judging track, the positions of its examples among the judged ones.
        tracks: those that judge, and the result if it does not.
    """
    everything = np.arange(len(current.loss))
    others = [np.setdiff1d(everything, np.array(own)) if len(judged) > 1 else everything for own in judged]
    picks = [_most_accurate(trials, current, rows) for rows in [*others, everything][:tracks]]
    kept = picks[-1]
    if kept is None:
        reason = "no candidate was more accurate on the selection split, or as accurate with a lower loss"
        return Choice([None] * tracks, current, 1.0, reason)
    outcome = current
    for own, pick in zip(judged, picks, strict=False):
        if pick is not None:
            outcome = _with_rows(outcome, pick.outcome, own)
    (before, loss_before), (after, loss_after) = (_standing(o, everything) for o in (current, kept.outcome))
    reason = (
        f"{kept.proposal.description}, best on the selection split: {before} to {after} of {len(everything)} right, "
        f"loss {-loss_before:.3f} to {-loss_after:.3f}"
    )
    return Choice(picks, outcome, paired_p(outcome.loss - current.loss, two_sided=False), reason)


def _most_accurate(trials: Sequence[Trial], current: Outcome, rows: Rows) -> Trial | None:
    best, standing = None, _standing(current, rows)
    for trial in trials:
        if np.isfinite(trial.outcome.loss).all() and _standing(trial.outcome, rows) > standing:
            best, standing = trial, _standing(trial.outcome, rows)
    return best


def _standing(outcome: Outcome, rows: Rows) -> tuple[int, float]:
    """How many examples are right, by the choices or, of open ones, to the letter; and minus the loss."""
    right = np.where(np.isnan(outcome.correct), outcome.exact, outcome.correct)
    return int(right[rows].sum()), -float(outcome.loss[rows].mean())


def _with_rows(first: Outcome, second: Outcome, rows: Sequence[int]) -> Outcome:
    """The first outcome, on some examples the second."""
    chosen = np.zeros(len(first.loss), dtype=bool)
    chosen[list(rows)] = True
    return _merge(chosen, first, second)


def completed(part: Outcome, rest: Outcome) -> Outcome:
    """Two outcomes on different examples as one."""
    return _merge(np.isnan(part.loss), part, rest)


def _merge(second_where: npt.NDArray[np.bool_], first: Outcome, second: Outcome) -> Outcome:
    return Outcome(*(np.where(second_where, getattr(second, f), getattr(first, f)) for f in OUTCOME_FIELDS))

"""What is said of an adaptation, and what is returned: the adapted model, or the base.

The adapted model is returned if it is significantly better than the base in some metric on the test split, and
significantly worse in neither accuracy nor exact match. Else the base is, and the verdict says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from service.jobs import Difference
from service.reports import SplitSizes
from workers.evaluation import Outcome, differences

SIGNIFICANT = 0.05
WORDS = {"accuracy": "accuracy over the choices", "exact_match": "exact match", "loss": "loss"}


@dataclass(frozen=True)
class Verdict:
    """The decision and its grounds."""

    improved: bool
    returned: bool
    """Whether the adapted model is what is returned; else the base is."""
    sentence: str
    difference: Difference
    """The one the decision stands on; of what is returned, so zero where that is the base."""
    differences: list[Difference]
    """Of what is returned, in every metric."""

    def opened_by(self, left: str) -> Verdict:
        """The same, its sentence after how much of the base is left."""
        return replace(self, sentence=f"{left}; {self.sentence}")


def judge(
    base: Outcome, adapted: Outcome, sizes: SplitSizes, seed: int, *, removed: int, bounded: bool = False
) -> Verdict:
    """Compare two models on one split and decide which is returned.

    Args:
        removed: how many components the adapted model lacks.
        bounded: whether the job has a `max_drift`, which may have kept some from being tried.
    """
    unchanged = differences(base, base, seed)
    where = f"{sizes.test} {'cross-validated' if sizes.cross_validated else 'unseen'} examples"
    if not removed:
        which = "no removal within max_drift" if bounded else "no removal"
        sentence = f"No significant improvement: {which} lowered the loss reliably. The base model is returned."
        return Verdict(False, False, sentence, unchanged[0], unchanged)
    if adapted.broken:
        told = f"the removal leaves the model without a finite loss on {adapted.broken} of them"
        sentence = f"Worse than the base on {where}: {told}. The base model is returned."
        return Verdict(False, False, sentence, unchanged[0], unchanged)
    found = differences(base, adapted, seed)
    worse = [d for d in found if d.metric != "loss" and d.high < 0 and d.p < SIGNIFICANT]
    better = [d for d in found if _better(d)]
    if worse or not better:
        told = _tell(worse[0] if worse else found[0], base, adapted)
        opening = "Worse than the base" if worse else "No significant improvement"
        return Verdict(
            False, False, f"{opening} on {where}: {told}. The base model is returned.", unchanged[0], unchanged
        )
    told = _tell(better[0], base, adapted)
    if better[0].metric == "loss":
        told += f"; {_tell(found[0], base, adapted)}, which is not significant"
    return Verdict(True, True, f"Improved on {where}: {told}.", better[0], found)


def judge_compressed(base: Outcome, adapted: Outcome, sizes: SplitSizes, seed: int) -> Verdict:
    """Compare a compressed model with its base. It is returned in any case."""
    where = f"{sizes.test} {'cross-validated' if sizes.cross_validated else 'unseen'} examples"
    found = differences(base, adapted, seed)
    first = found[0]
    before, after = _values(first, base, adapted)
    p = "p < .001" if first.p < 0.001 else f"p = {first.p:.3f}"
    name = {"accuracy": "accuracy", "exact_match": "exact match", "loss": "loss"}[first.metric]
    sentence = f"{name} {100 * after:.1f} % (base {100 * before:.1f} %, {p}) on {where}."
    worse = any(d.metric != "loss" and d.high < 0 and d.p < SIGNIFICANT for d in found)
    better = [d for d in found if _better(d)]
    improved = bool(better) and not worse
    return Verdict(improved, True, sentence, better[0] if improved else first, found)


def _better(difference: Difference) -> bool:
    right_way = difference.high < 0 if difference.metric == "loss" else difference.low > 0
    return right_way and difference.p < SIGNIFICANT


def _tell(difference: Difference, base: Outcome, adapted: Outcome) -> str:
    before, after = _values(difference, base, adapted)
    p = "p < .001" if difference.p < 0.001 else f"p = {difference.p:.3f}"
    return (
        f"{WORDS[difference.metric]} {before:.3f} to {after:.3f} "
        f"({difference.value:+.3f}, 95 % interval {difference.low:+.3f} to {difference.high:+.3f}, {p})"
    )


def _values(difference: Difference, base: Outcome, adapted: Outcome) -> tuple[float, float]:
    """The metric's mean before and after."""
    values = {"accuracy": "correct", "exact_match": "exact", "loss": "loss"}[difference.metric]
    # NaN for an example without choices.
    before, after = (float(np.nanmean(getattr(outcome, values))) for outcome in (base, adapted))
    return before, after

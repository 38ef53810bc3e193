"""What is said and what is returned, for outcomes that are known."""

from __future__ import annotations

import numpy as np
import pytest

from service.reports import SplitSizes
from workers.evaluation import Array, Outcome
from workers.verdict import Verdict, judge

N = 200
UNSEEN = SplitSizes(gradient=10, selection=10, test=N)
RNG = np.random.default_rng(0)
NOISE: Array = RNG.normal(0, 0.5, N)


def outcome(hits: int, loss: float, exact: int | None = None, *, closed: bool = True) -> Outcome:
    """The first `hits` of N are right; the losses scatter about `loss`, in the same way each time."""
    correct: Array = (np.arange(N) < hits).astype(float)
    return Outcome(
        loss=loss + NOISE * loss,
        exact=(np.arange(N) < (hits if exact is None else exact)).astype(float),
        predicted=np.zeros(N, np.int64),
        correct=correct if closed else np.full(N, np.nan),
    )


def verdict(base: Outcome, adapted: Outcome, removed: int = 5, sizes: SplitSizes = UNSEEN) -> Verdict:
    return judge(base, adapted, sizes, 0, removed=removed)


def test_better_in_accuracy_is_improved_and_told_with_numbers() -> None:
    found = verdict(outcome(60, 2.0), outcome(100, 1.5))
    assert found.improved
    assert found.difference.metric == "accuracy"
    assert found.difference.value == pytest.approx(0.2)
    assert found.sentence.startswith(
        "Improved on 200 unseen examples: accuracy over the choices 0.300 to 0.500 (+0.200"
    )
    assert "p < .001" in found.sentence
    assert [d.metric for d in found.differences] == ["accuracy", "exact_match", "loss"]


def test_open_answers_are_judged_by_exact_match() -> None:
    found = verdict(outcome(20, 2.0, closed=False), outcome(60, 1.5, closed=False))
    assert found.improved
    assert found.difference.metric == "exact_match"
    assert "exact match 0.100 to 0.300" in found.sentence


def test_a_lower_loss_alone_is_told_to_be_that() -> None:
    found = verdict(outcome(60, 2.0), outcome(61, 1.5))
    assert found.improved
    assert found.difference.metric == "loss"
    assert found.difference.value < 0
    assert "loss 2.0" in found.sentence
    assert "which is not significant" in found.sentence


def test_worse_in_one_metric_is_not_outweighed_by_better_in_another() -> None:
    found = verdict(outcome(60, 2.0, exact=60), outcome(100, 1.0, exact=20))
    assert not found.improved
    assert found.sentence.startswith("Worse than the base on 200 unseen examples: exact match 0.300 to 0.100")
    assert found.sentence.endswith("The base model is returned.")


def test_a_difference_that_may_be_chance_is_no_improvement() -> None:
    found = verdict(outcome(60, 2.0), outcome(63, 2.0))
    assert not found.improved
    assert found.sentence.startswith(
        "No significant improvement on 200 unseen examples: accuracy over the choices 0.300"
    )
    assert found.sentence.endswith("The base model is returned.")


@pytest.mark.parametrize(("adapted", "removed"), [(outcome(20, 3.0), 5), (outcome(63, 2.0), 5), (outcome(60, 2.0), 0)])
def test_the_differences_are_those_of_what_is_returned(adapted: Outcome, removed: int) -> None:
    found = verdict(outcome(60, 2.0), adapted, removed)
    assert not found.improved
    assert found.difference in found.differences
    assert all((d.value, d.low, d.high, d.p) == (0, 0, 0, 1) for d in found.differences)


def test_nothing_removed_is_said_to_be_that() -> None:
    found = verdict(outcome(60, 2.0), outcome(60, 2.0), removed=0)
    assert found.sentence == (
        "No significant improvement: no removal lowered the loss reliably. The base model is returned."
    )
    held = judge(outcome(60, 2.0), outcome(60, 2.0), UNSEEN, 0, removed=0, bounded=True)
    assert "no removal within max_drift lowered the loss" in held.sentence


def test_a_cross_validated_estimate_is_called_one() -> None:
    sizes = SplitSizes(gradient=N, selection=N, test=N, folds=4, cross_validated=True)
    assert "on 200 cross-validated examples" in verdict(outcome(60, 2.0), outcome(100, 1.5), sizes=sizes).sentence


def test_one_test_example_decides_nothing() -> None:
    def single(hit: float, loss: float) -> Outcome:
        return Outcome(np.array([loss]), np.array([hit]), np.array([0]), np.array([hit]))

    found = verdict(single(0, 9.0), single(1, 1.0), sizes=SplitSizes(gradient=10, selection=10, test=1))
    assert not found.improved


def test_a_model_that_breaks_on_the_test_split_alone_is_not_returned() -> None:
    base, adapted = outcome(60, 2.0), outcome(100, 1.5)
    adapted.loss[[3, 7]] = np.inf
    found = verdict(base, adapted)
    assert not found.improved
    assert found.sentence == (
        "Worse than the base on 200 unseen examples: the removal leaves the model without a finite loss on 2 of them. "
        "The base model is returned."
    )
    assert [d.value for d in found.differences] == [0, 0, 0]

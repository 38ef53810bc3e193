"""Every example has one use, by seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.division import CROSS_FIT_BELOW, FOLDS
from service.errors import InvalidInput
from workers.examples import Encoded
from workers.splits import Splits, deal_folds, divide


def example(i: int, label: str = "x") -> Encoded:
    return Encoded((i,), ((1,), (2,)), 0, (label, "other"))


def examples(n: int, start: int = 0) -> list[Encoded]:
    return [example(start + i, "abc"[i % 3]) for i in range(n)]


def parts(splits: Splits) -> tuple[list[Encoded], list[Encoded], list[Encoded]]:
    """Gradient, selection and test split of a job that is not cross-fitted."""
    (track,) = splits.tracks
    assert splits.result is track
    return [splits.pool[r] for r in track.fit], [splits.pool[r] for r in track.judge], splits.test


@pytest.mark.parametrize("n", [60, 61, 100, 333])
def test_enough_examples_are_divided_into_three_disjoint_parts(n: int) -> None:
    given_ = examples(n)
    splits = divide(given_, None, None, seed=0)
    gradient, selection, test = parts(splits)
    assert Counter([*gradient, *selection, *test]) == Counter(given_)
    sizes = splits.sizes
    assert (sizes.gradient, sizes.selection, sizes.test) == (len(gradient), len(selection), len(test))
    assert (sizes.folds, sizes.cross_validated, sizes.duplicates_dropped) == (None, False, 0)
    assert len(gradient) == pytest.approx(0.4 * n, abs=1)
    assert len(selection) == pytest.approx(0.3 * n, abs=1)


def test_the_seed_decides_and_nothing_else() -> None:
    one, two, other = (parts(divide(examples(100), None, None, seed=s)) for s in (7, 7, 8))
    assert one == two
    assert one != other
    first_rows = parts(divide(examples(100), None, None, seed=0))[0]
    assert first_rows != examples(100)[: len(first_rows)]  # not the file's order


def test_what_the_job_brings_is_taken_as_it_is() -> None:
    gradient, selection, test = parts(divide(examples(20), examples(30, 100), examples(40, 200), seed=0))
    assert gradient == examples(20)
    assert selection == examples(30, 100)
    assert test == examples(40, 200)


def test_a_test_split_alone_leaves_two_parts_of_the_examples() -> None:
    gradient, selection, test = parts(divide(examples(100), None, examples(9, 200), seed=0))
    assert test == examples(9, 200)
    assert Counter([*gradient, *selection]) == Counter(examples(100))
    assert len(gradient) == 50


@pytest.mark.parametrize(("n", "v"), [(20, 60), (100, 200), (100, 20)])
def test_a_validation_split_alone_gives_the_test_split_from_the_larger_purse(n: int, v: int) -> None:
    given_, brought = examples(n), examples(v, 1000)
    gradient, selection, test = parts(divide(given_, brought, None, seed=0))
    assert Counter([*gradient, *selection, *test]) == Counter([*given_, *brought])
    assert test
    if v >= CROSS_FIT_BELOW:
        assert gradient == given_
        assert set(selection) | set(test) == set(brought)
    else:
        assert selection == brought
        assert set(gradient) | set(test) == set(given_)


@pytest.mark.parametrize("n", [8, 9, 16, 59])
def test_few_examples_are_cross_fitted_each_judged_once_by_a_track_without_it(n: int) -> None:
    splits = divide(examples(n), None, None, seed=0)
    assert len(splits.tracks) == FOLDS
    assert sorted(r for track in splits.tracks for r in track.judge) == list(range(n))
    for track in splits.tracks:
        assert track.judge
        assert sorted([*track.fit, *track.judge]) == list(range(n))
    assert splits.result.fit == list(range(n))
    assert splits.result.judge == []
    assert splits.result not in splits.tracks
    sizes = splits.sizes
    assert (sizes.gradient, sizes.selection, sizes.test, sizes.folds) == (n, n, n, FOLDS)
    assert sizes.cross_validated
    assert splits.test == []


def test_few_examples_with_a_test_split_are_cross_fitted_and_tested_on_it() -> None:
    splits = divide(examples(16), None, examples(50, 100), seed=0)
    assert splits.test == examples(50, 100)
    assert splits.sizes.test == 50
    assert splits.sizes.folds == FOLDS
    assert not splits.sizes.cross_validated


def test_few_examples_and_a_small_validation_split_are_pooled() -> None:
    splits = divide(examples(16), examples(12, 100), None, seed=0)
    assert Counter(splits.pool) == Counter([*examples(16), *examples(12, 100)])
    assert splits.sizes.cross_validated


def test_duplicates_are_dropped_and_counted_before_anything_is_divided() -> None:
    given_ = examples(70)
    splits = divide([*given_, *given_[:30]], None, [example(500), example(500)], seed=0)
    gradient, selection, test = parts(splits)
    assert Counter([*gradient, *selection]) == Counter(given_)
    assert test == [example(500)]
    assert splits.sizes.duplicates_dropped == 31


def test_the_same_example_with_its_choices_in_another_order_is_a_duplicate() -> None:
    one = Encoded((5,), ((1,), (2,)), 0, ("a", "b"))
    turned = Encoded((5,), ((2,), (1,)), 1, ("b", "a"))
    splits = divide([*examples(8, 100), one, turned], None, None, seed=0)
    assert splits.sizes.duplicates_dropped == 1
    assert turned not in splits.pool


def test_too_few_different_examples_are_refused() -> None:
    with pytest.raises(InvalidInput, match="7 different") as refused:
        divide([*examples(7), *examples(7)], None, None, seed=0)
    assert refused.value.param == "examples"


@given(labels=st.lists(st.sampled_from("abcd"), min_size=8, max_size=59), seed=st.integers(0, 99))
def test_folds_are_as_equal_as_can_be_in_size_and_in_labels(labels: list[str], seed: int) -> None:
    fold = deal_folds(labels, FOLDS, seed)
    sizes = Counter(fold)
    assert set(fold) <= set(range(FOLDS))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for label in set(labels):
        counts = [sum(1 for f, x in zip(fold, labels, strict=True) if f == k and x == label) for k in range(FOLDS)]
        assert max(counts) - min(counts) <= 1

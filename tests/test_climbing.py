"""The climb along plans of growing size: where it begins, what it tries, when it gives up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from workers.climbing import beginning, climb


def tried(gains: Sequence[float], begin: int) -> list[int]:
    """The indices that a climb over plans of these gains tries, in its order."""
    seen: list[int] = []

    def gain_of(k: int) -> float:
        seen.append(k)
        return gains[k]

    climb(iter(range(begin, len(gains))), iter(reversed(range(begin))), gain_of)
    return seen


@pytest.mark.parametrize(
    ("gains", "begin", "expected"),
    [
        ([1, 2, 4, 5, 4.5, 4.4, 9], 2, [2, 3, 4, 5]),  # two beyond the best
        ([1, 2, 4, 5, 4.5, 5.5, 5.4], 2, [2, 3, 4, 5, 6]),  # one dip on the way up ends nothing
        ([1, 2, 4, 5, 3.9, 9], 2, [2, 3, 4]),  # less than four fifths of the best: behind the summit
        ([1, 3, 4, 1], 2, [2, 3, 1]),  # the first is the best: one smaller one shows that
        ([5, 4.5, 4, 1], 2, [2, 3, 1, 0]),  # down as long as it gets better
        ([0.1, -1, -2, 9], 2, [2, 1, 0]),  # the first raises the loss: never to larger ones
        ([-3, -2, -1], 2, [2, 1]),  # nothing gains anywhere
        ([1, 2], 0, [0, 1]),  # to the end of the list
        ([2], 0, [0]),
        ([], 0, []),
    ],
)
def test_a_climb_tries_what_can_still_be_the_best(gains: list[float], begin: int, expected: list[int]) -> None:
    assert tried(gains, begin) == expected


def test_plans_are_asked_for_only_when_they_are_tried() -> None:
    asked: list[int] = []

    def plans() -> Iterator[int]:
        for k in range(9):
            asked.append(k)
            yield k

    climb(plans(), iter(()), lambda k: -1.0)
    assert asked == [0]


def test_a_climb_begins_two_doublings_in_or_at_a_quarter_of_the_earlier_lists_best() -> None:
    assert beginning([16, 32, 64, 128, 200], None) == 2
    assert beginning([16, 20], None) == 1
    assert beginning([5, 10, 20, 40, 80], 104) == 2
    assert beginning([5, 10, 20, 40, 80], 4) == 0
    assert beginning([5, 10], 10_000) == 1

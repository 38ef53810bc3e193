"""How far to go along a list of plans each of which contains the one before it: a climb to the one of largest gain.

The gain rises with the size up to where curvature ends it, and falls steeply behind that; judged on few examples it is
a little noisy on the way up. Sizes double, so what is tried is told by where the climb begins and when it gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import TypeVar

T = TypeVar("T")

# Sizes tried beyond the best so far before a climb ends: the gain is not always concave in the size.
PATIENCE = 2
# What gains less than this part of the best is behind the summit.
BEHIND = 0.8
# A climb begins at the size after so many doublings: the best of a pass is rarely smaller.
BEGIN = 2
# The second list's best has about this part of the first's size: what is certain and small stands late in it.
SECOND_PART = 0.25


def climb(up: Iterable[T], down: Iterable[T], gain_of: Callable[[T], float]) -> None:
    """Try plans of growing size while they gain, and smaller ones if the first of them is the best.

    Args:
        up: from the size where the climb begins; asked for one by one.
        down: the smaller ones, the largest first.
        gain_of: tries one; its gain is a fall in loss, negative where the loss rises.
    """
    first, best, beyond = None, 0.0, 0
    for plan in up:
        gain = gain_of(plan)
        first = gain if first is None else first
        beyond = 0 if gain > best else beyond + 1
        best = max(best, gain)
        if best == 0 or gain < BEHIND * best or beyond == PATIENCE:
            break
    if first is None or best > max(first, 0.0):
        return
    for plan in down:
        gain = gain_of(plan)
        if gain <= first:
            return
        first = gain


def beginning(sizes: Sequence[int], earlier: int | None) -> int:
    """The index into a list's sizes where its climb begins.

    Args:
        earlier: the best size of the list before; None where there is none, or nothing of it gained.
    """
    if earlier is None:
        return min(BEGIN, len(sizes) - 1)
    return min(range(len(sizes)), key=lambda k: abs(log(sizes[k] / (SECOND_PART * earlier))))

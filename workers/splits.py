"""Which examples are ranked by, selected on and tested on: three disjoint parts, by seed.

What a job brings itself (`validation` is the selection split, `test` the test split) is taken as it is; the rest is
split off `examples`, the test split off a `validation` that is large enough. Under `CROSS_FIT_BELOW` examples there is
nothing to split off: gradient and selection are cross-fitted over folds, and where no test split was brought either,
the estimate is the cross-validated one (`service.division` has the rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from service import division
from service.division import FOLDS
from service.errors import InvalidInput
from service.jobs import MIN_EXAMPLES
from service.reports import SplitSizes
from workers.examples import Encoded
from workers.subject import Track


@dataclass(frozen=True)
class Splits:
    """A job's examples with their use."""

    pool: list[Encoded]
    """All that is ranked by or selected on; the rows of the tracks."""
    tracks: list[Track]
    """Those that judge: one, or one a fold."""
    result: Track
    """Whose plan is the result."""
    test: list[Encoded]
    """Seen by nothing before the verdict; empty where the estimate is cross-validated."""
    sizes: SplitSizes


def divide(
    examples: Sequence[Encoded],
    validation: Sequence[Encoded] | None,
    test: Sequence[Encoded] | None,
    seed: int,
) -> Splits:
    """Give every example its use. Duplicates within a list are dropped first, also those whose choices stand in
    another order: in two splits they would prove nothing, and in one they would count twice.

    Raises:
        InvalidInput: if too few different examples are left.
    """
    given = len(examples) + len(validation or ()) + len(test or ())
    examples = _different(examples)
    validation = None if validation is None else _different(validation)
    test = None if test is None else _different(test)
    dropped = given - len(examples) - len(validation or ()) - len(test or ())
    if len(examples) < MIN_EXAMPLES:
        raise InvalidInput(
            f"at least {MIN_EXAMPLES} examples are needed; there are {len(examples)} different ones",
            param="examples",
        )

    rule = division.divide(len(examples), _count(validation), _count(test))
    if rule.cross_fit:
        examples, validation = [*examples, *(validation or ())], None
    parts = {**_split(examples, rule.examples, seed), **_split(validation or (), rule.validation, seed)}
    examples = parts.get("gradient", examples)
    validation, test = parts.get("selection", validation), parts.get("test", test)

    n = len(examples)
    if validation is not None:
        track = Track(list(range(n)), list(range(n, n + len(validation))))
        sizes = SplitSizes(gradient=n, selection=len(validation), test=len(test or ()), duplicates_dropped=dropped)
        return Splits([*examples, *validation], [track], track, list(test or ()), sizes)
    fold = deal_folds([example.labels[example.gold] for example in examples], FOLDS, seed)
    tracks = [Track([i for i in range(n) if fold[i] != k], [i for i in range(n) if fold[i] == k]) for k in range(FOLDS)]
    sizes = SplitSizes(
        gradient=n,
        selection=n,
        test=len(test or ()) or n,
        folds=FOLDS,
        duplicates_dropped=dropped,
        cross_validated=not test,
    )
    return Splits(list(examples), tracks, Track(list(range(n)), []), list(test or ()), sizes)


def _count(items: Sequence[Encoded] | None) -> int | None:
    return None if items is None else len(items)


def _different(items: Sequence[Encoded]) -> list[Encoded]:
    first: dict[object, Encoded] = {}
    for item in items:
        first.setdefault((item.prompt, item.continuations[item.gold], frozenset(item.continuations)), item)
    return list(first.values())


def _split(items: Sequence[Encoded], fractions: Mapping[str, float], seed: int) -> dict[str, list[Encoded]]:
    """Shuffle by `seed` and divide by `fractions`, which sum to 1; each part in the original order."""
    order = np.random.default_rng(seed).permutation(len(items))
    bounds = np.round(np.cumsum([0.0, *fractions.values()]) * len(items)).astype(int)
    return {
        name: [items[i] for i in sorted(order[a:b])] for name, (a, b) in zip(fractions, pairwise(bounds), strict=True)
    }


def deal_folds(labels: Sequence[str], folds: int, seed: int) -> list[int]:
    """A fold for each example, equally many in each, and of each label as equally many as can be."""
    order: list[int] = np.random.default_rng(seed).permutation(len(labels)).tolist()
    order.sort(key=lambda i: labels[i])
    fold = [0] * len(labels)
    for rank, i in enumerate(order):
        fold[i] = rank % folds
    return fold

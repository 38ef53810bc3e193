"""Which examples are ranked by, selected on and tested on: three disjoint parts, by seed.

What a job brings itself (`validation` is the selection split, `test` the test split) is taken as it is; the rest is
split off `examples`. Under `CROSS_FIT_BELOW` examples there is nothing to split off: gradient and selection are
cross-fitted over folds, and where no test split was brought either, the estimate is the cross-validated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from service.errors import InvalidInput
from service.jobs import MIN_EXAMPLES
from service.reports import SplitSizes
from workers.examples import Encoded
from workers.search import Track

CROSS_FIT_BELOW = 60
FOLDS = 4


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

    if validation is None and len(examples) >= CROSS_FIT_BELOW:
        if test is None:
            examples, validation, test = _split(examples, (0.4, 0.3, 0.3), seed)
        else:
            examples, validation = _split(examples, (0.5, 0.5), seed)
    elif validation is not None and test is None:
        if len(validation) >= CROSS_FIT_BELOW:
            validation, test = _split(validation, (0.5, 0.5), seed)
        elif len(examples) >= CROSS_FIT_BELOW:
            examples, test = _split(examples, (0.7, 0.3), seed)
        else:
            examples, validation = [*examples, *validation], None

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


def _different(items: Sequence[Encoded]) -> list[Encoded]:
    first: dict[object, Encoded] = {}
    for item in items:
        first.setdefault((item.prompt, item.continuations[item.gold], frozenset(item.continuations)), item)
    return list(first.values())


def _split(items: Sequence[Encoded], fractions: Sequence[float], seed: int) -> list[list[Encoded]]:
    """Shuffle by `seed` and divide by `fractions`, which sum to 1; each part in the original order."""
    order = np.random.default_rng(seed).permutation(len(items))
    bounds = np.round(np.cumsum([0.0, *fractions]) * len(items)).astype(int)
    return [[items[i] for i in sorted(order[a:b])] for a, b in pairwise(bounds)]


def deal_folds(labels: Sequence[str], folds: int, seed: int) -> list[int]:
    """A fold for each example, equally many in each, and of each label as equally many as can be."""
    order: list[int] = np.random.default_rng(seed).permutation(len(labels)).tolist()
    order.sort(key=lambda i: labels[i])
    fold = [0] * len(labels)
    for rank, i in enumerate(order):
        fold[i] = rank % folds
    return fold

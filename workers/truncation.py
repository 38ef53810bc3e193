"""Truncations: a weight, or each of several blocks of its rows, kept to a fraction of its rank.

Kept to the retention r, a matrix has its `max(1, int(r * rank))` largest components left: LASER's own rounding
(`do_low_rank` of its repository), which has no case for a rank of 0. Row blocks are disjoint and together all rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.cluster.vq import kmeans2
from torch import Tensor, from_numpy


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Some of a weight's output rows."""

    label: str
    """`0:192`, or `cluster 2/8`: unique among the blocks that one search makes of a weight."""
    index: slice | Tensor
    """The rows: a range, or (n,) int64 in ascending order."""

    @property
    def size(self) -> int:
        """How many rows."""
        return self.index.stop - self.index.start if isinstance(self.index, slice) else self.index.numel()


def contiguous_blocks(rows: int, blocks: int) -> list[RowBlock]:
    """All rows as blocks of neighbours, of equal size but for one row; no more blocks than rows."""
    blocks = min(blocks, rows)
    bounds = [rows * k // blocks for k in range(blocks + 1)]
    return [RowBlock(f"{a}:{b}", slice(a, b)) for a, b in pairwise(bounds)]


def clustered_blocks(W: Tensor, blocks: int, seed: int) -> list[RowBlock]:
    """All rows as clusters of similar ones, by k-means (k-means++ start, Euclidean distance).

    Args:
        W: (out, in).
        blocks: clusters asked for; there are no more than different rows, and empty ones are left out.
    """
    rows = W.detach().double().cpu().numpy()
    blocks = min(blocks, len(np.unique(rows, axis=0)))  # k-means++ divides by zero where there are fewer different rows
    with warnings.catch_warnings():
        # A cluster may lose its rows to others on the way.
        warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)
        _, labels = kmeans2(rows, blocks, minit="++", rng=seed)
    found = [from_numpy((labels == k).nonzero()[0]) for k in range(blocks)]
    return [RowBlock(f"cluster {k + 1}/{blocks}", index) for k, index in enumerate(found) if index.numel()]


def kept_rank(rank: int, retention: float) -> int:
    """How many of `rank` components are kept."""
    return max(1, int(rank * retention))


def tail(rank: int, retention: float) -> tuple[int, ...]:
    """The components that go: the smallest, by their indices."""
    return tuple(range(kept_rank(rank, retention), rank))


def tails(ranks: Mapping[str, int], retention: float) -> dict[str, tuple[int, ...]]:
    """For each matrix or block, by name, the components that go; those that lose none are left out."""
    return {name: gone for name, rank in ranks.items() if (gone := tail(rank, retention))}

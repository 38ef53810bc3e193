"""Row blocks are a partition; what a retention keeps is the best approximation of its rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.pruning import pruned
from workers.spectrum import decompose
from workers.truncation import RowBlock, clustered_blocks, contiguous_blocks, kept_rank, tail, tails


def rows_of(block: RowBlock, rows: int) -> list[int]:
    found: list[int] = torch.arange(rows)[block.index].tolist()
    return found


def noise(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 200), blocks=st.integers(1, 64))
def test_contiguous_blocks_are_all_rows_in_order_and_of_equal_size_but_for_one_row(rows: int, blocks: int) -> None:
    found = contiguous_blocks(rows, blocks)
    assert len(found) == min(rows, blocks)
    assert [row for block in found for row in rows_of(block, rows)] == list(range(rows))
    sizes = [block.size for block in found]
    assert sizes == [len(rows_of(block, rows)) for block in found]
    assert max(sizes) - min(sizes) <= 1
    assert len({block.label for block in found}) == len(found)


@pytest.mark.parametrize(("rows", "blocks"), [(30, 4), (30, 1), (7, 7), (5, 9), (64, 16)])
def test_clusters_are_all_rows_once_and_the_same_for_the_same_seed(rows: int, blocks: int) -> None:
    W = noise(rows, 6)
    found = clustered_blocks(W, blocks, seed=3)
    assert sorted(row for block in found for row in rows_of(block, rows)) == list(range(rows))
    assert all(rows_of(block, rows) == sorted(rows_of(block, rows)) for block in found)
    assert all(block.size == len(rows_of(block, rows)) > 0 for block in found)
    assert len({block.label for block in found}) == len(found) <= blocks
    again = clustered_blocks(W, blocks, seed=3)
    assert [rows_of(block, rows) for block in found] == [rows_of(block, rows) for block in again]


def test_clusters_are_of_rows_that_are_alike() -> None:
    centres = 20 * noise(3, 8, seed=1)
    owner = torch.tensor([0, 1, 2] * 10)
    found = clustered_blocks(centres[owner] + noise(30, 8), 3, seed=0)
    assert sorted(rows_of(block, 30) for block in found) == [list(range(k, 30, 3)) for k in range(3)]


def test_rows_that_are_all_alike_are_fewer_clusters_and_no_warning() -> None:
    for distinct in (1, 3):
        found = clustered_blocks(noise(distinct, 4).repeat(4, 1), 4, seed=0)
        assert sorted(row for block in found for row in rows_of(block, 4 * distinct)) == list(range(4 * distinct))
        assert len(found) == distinct


@pytest.mark.parametrize(
    ("rank", "retention", "kept"),
    [(576, 0.01, 5), (576, 0.9, 518), (4096, 0.05, 204), (16, 0.01, 1), (1, 0.5, 1), (100, 0.29, 28), (10, 0.999, 9)],
)
def test_the_rank_that_is_kept_is_rounded_down_as_laser_does_and_never_nothing(
    rank: int, retention: float, kept: int
) -> None:
    assert kept_rank(rank, retention) == kept
    assert tail(rank, retention) == tuple(range(kept, rank))


def test_what_loses_nothing_is_no_part_of_a_plan() -> None:
    assert tails({"a": 4, "b": 1}, 0.5) == {"a": (2, 3)}


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_a_truncated_matrix_is_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    W = noise(*shape).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for retention in (0.1, 0.5, 0.9):
        r = kept_rank(min(shape), retention)
        found = pruned(W, decompose(W), tail(min(shape), retention))
        torch.testing.assert_close(found, (U[:, :r] * S[:r]) @ Vh[:r], rtol=0, atol=1e-10)
        assert torch.linalg.matrix_rank(found) == r

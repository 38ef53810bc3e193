"""Components against torch's SVD, and a cache that may be slow or small but never wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.live import REPOSITORY
from workers import spectrum
from workers.spectrum import Spectrum, SpectrumCache, decompose

pytestmark = pytest.mark.usefixtures("one_thread")


def random(out: int, in_: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(W: Tensor, found: Spectrum) -> None:
    """Values, orthonormality, reconstruction and each component, by torch.linalg.svd in float64."""
    W64 = W.double()
    U, S, Vh = torch.linalg.svd(W64, full_matrices=False)
    top = float(S[0]) or 1.0
    precise = W.dtype == torch.float64
    tiny = 1e-7 if precise else 1e-6  # of the largest: the root of what a Gram matrix in float64 rounds
    rank = min(W.shape)
    assert found.rank == rank
    assert found.basis.shape == (rank, rank)
    assert found.S.dtype == found.basis.dtype == (torch.float64 if precise else torch.float32)
    torch.testing.assert_close(found.S.double(), S, rtol=0, atol=tiny * top)
    assert bool((found.S.diff() <= 0).all())
    eye = found.basis.double().T @ found.basis.double()
    torch.testing.assert_close(eye, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
    B, A = found.factors(W, range(rank))
    assert (B.shape, A.shape) == ((W.shape[0], rank), (rank, W.shape[1]))
    torch.testing.assert_close((B @ A).double(), W64, rtol=0, atol=1e-5 * top)
    # What stands for itself, away from ties, is the same component up to the sign of both vectors.
    gaps = torch.full_like(S, torch.inf)
    if rank > 1:
        gaps[1:] = (S[:-1] - S[1:]).abs()
        gaps[:-1] = torch.minimum(gaps[:-1], gaps[1:])
    for i in range(rank):
        if gaps[i] > 0.02 * top and S[i] > 0.02 * top:
            B, A = found.factors(W, [i])
            torch.testing.assert_close((B @ A).double(), S[i] * torch.outer(U[:, i], Vh[i]), rtol=0, atol=1e-4 * top)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 9), (9, 1), (1, 1)])
def test_components_are_those_of_an_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = random(*shape, dtype=dtype)
    check(W, decompose(W))


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 12), in_=st.integers(1, 12), seed=st.integers(0, 1000), keep=st.integers(0, 12))
def test_components_are_those_of_an_svd_whatever_the_shape_and_rank(out: int, in_: int, seed: int, keep: int) -> None:
    k = min(keep, out, in_)
    W = random(out, k, seed) @ random(k, in_, seed + 1)
    check(W, decompose(W))


def test_a_rank_deficient_weight_has_zero_values_at_its_end() -> None:
    W = random(30, 4, dtype=torch.float64) @ random(4, 20, 1, dtype=torch.float64)
    S = decompose(W).S
    assert bool((S[:4] > 1).all())
    assert bool((S[4:] < 1e-6 * S[0]).all())


def test_a_zero_weight_has_only_zero_values_and_removing_its_components_changes_nothing() -> None:
    found = decompose(torch.zeros(6, 4))
    assert not found.S.any()
    B, A = found.factors(torch.zeros(6, 4), [0, 3])
    assert not (B @ A).any()


def test_tied_values_still_give_an_orthonormal_basis_that_reconstructs() -> None:
    W = torch.linalg.qr(random(16, 16))[0]
    found = decompose(W)
    torch.testing.assert_close(found.S, torch.ones(16), rtol=0, atol=1e-6)
    check(W, found)


def test_small_values_beside_large_ones_are_kept_to_seven_digits_of_the_largest() -> None:
    U, V = torch.linalg.qr(random(32, 32))[0].double(), torch.linalg.qr(random(32, 32, 1))[0].double()
    S = torch.logspace(3, -3, 32, dtype=torch.float64)
    found = decompose((U * S @ V.T).float())
    assert float((found.S.double() - torch.linalg.svdvals((U * S @ V.T).float().double())).abs().max()) < 4e-7 * 1e3


def test_the_same_weight_gives_the_same_factors_to_the_bit() -> None:
    W = random(40, 24)
    first, second = decompose(W), decompose(W.clone())
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.basis, second.basis)


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that were really decomposed."""
    done: list[tuple[int, ...]] = []

    def counted(W: Tensor) -> Spectrum:
        done.append(tuple(W.shape))
        return decompose(W)

    monkeypatch.setattr(spectrum, "decompose", counted)
    return done


def same(a: Spectrum, b: Spectrum) -> bool:
    return torch.equal(a.S, b.S) and torch.equal(a.basis, b.basis) and a.side == b.side


def files(cache: SpectrumCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (8, 8), (7, 1), (1, 7)])
def test_a_weight_is_decomposed_once_for_all_who_share_the_folder(
    shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path, decompositions: list[tuple[int, ...]]
) -> None:
    W = random(*shape, dtype=dtype)
    first = SpectrumCache(tmp_path).get(W)
    second = SpectrumCache(tmp_path).get(W.clone())
    assert decompositions == [shape]
    assert same(first, second)
    assert same(first, decompose(W))


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (7, 1), (1, 7)])
def test_a_transposed_view_is_cached_as_the_weight_it_shows(
    shape: tuple[int, int], tmp_path: Path, decompositions: list[tuple[int, ...]]
) -> None:
    stored = random(*shape)
    cache = SpectrumCache(tmp_path)
    assert same(cache.get(stored.T), decompose(stored.T.contiguous()))
    cache.get(stored.T.contiguous())
    assert decompositions == [shape[::-1]]


def test_a_weight_that_differs_in_a_bit_a_shape_or_a_type_never_gets_anothers_factors(tmp_path: Path) -> None:
    W = random(12, 6)
    changed = W.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    zeros = torch.zeros(4, 6)
    weights = [
        W,
        changed,
        W.reshape(6, 12),
        W.reshape(24, 3),
        W.double(),
        W.T.contiguous(),
        zeros,
        zeros.T,
        zeros.half(),
    ]
    cache = SpectrumCache(tmp_path)
    for _ in range(2):
        for weight in weights:
            assert same(cache.get(weight), decompose(weight))
    # zeros.T is zeros in another shape: nine weights, nine files.
    assert len(files(cache)) == len(weights)


def corrupt_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        corrupt_last_byte,
        lambda content: content[: len(content) // 2],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: bytes(len(content)),
    ],
    ids=["a flipped bit", "half of it", "less than a digest", "nothing", "too much", "zeros"],
)
def test_a_damaged_file_is_computed_anew_and_replaced(
    damage: Callable[[bytes], bytes], tmp_path: Path, decompositions: list[tuple[int, ...]]
) -> None:
    W = random(12, 6)
    cache = SpectrumCache(tmp_path)
    cache.get(W)
    (file,) = files(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(cache.get(W), decompose(W))
    assert file.read_bytes() == whole
    cache.get(W)
    assert len(decompositions) == 2


def test_a_whole_file_under_anothers_name_is_computed_anew(
    tmp_path: Path, decompositions: list[tuple[int, ...]]
) -> None:
    W, other = random(12, 6), random(12, 6, 1)
    cache = SpectrumCache(tmp_path)
    cache.get(W)
    (mine,) = files(cache)
    cache.get(other)
    (others,) = set(files(cache)) - {mine}
    mine.write_bytes(others.read_bytes())
    assert same(cache.get(W), decompose(W))
    assert len(decompositions) == 3


def test_writers_at_once_leave_whole_files_and_nothing_else(tmp_path: Path) -> None:
    weights = [random(48, 24, seed) for seed in range(4)]
    expected = [decompose(W) for W in weights]
    start = threading.Barrier(8)
    wrong: list[int] = []

    def work() -> None:
        start.wait()
        for _ in range(5):
            for k, W in enumerate(weights):
                if not same(SpectrumCache(tmp_path).get(W), expected[k]):
                    wrong.append(k)
                for file in tmp_path.glob("[!.]*"):
                    file.unlink(missing_ok=True)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not list(tmp_path.glob(".*"))


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from workers.spectrum import SpectrumCache

torch.set_num_threads(1)
folder, file, fate = sys.argv[1:]
weights = torch.load(file)
if fate == "killed":  # between the write and the rename, of a weight of its own if the others are written already
    Path.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    weights.append(torch.ones(8, 4))
print("ready", flush=True)
sys.stdin.readline()
for W in weights:
    SpectrumCache(Path(folder)).get(W)
"""
WEIGHTS = 12


def test_processes_that_write_at_once_and_one_that_is_killed_leave_a_whole_cache(
    tmp_path: Path, decompositions: list[tuple[int, ...]]
) -> None:
    weights = [random(48, 24, seed) for seed in range(WEIGHTS)]
    torch.save(weights, tmp_path / "weights")
    folder = tmp_path / "cache"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(tmp_path / "weights"), fate],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for fate in ("lives", "killed")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    cache = SpectrumCache(folder)
    for W in weights:
        assert same(cache.get(W), decompose(W))
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL]
    (leftover,) = folder.glob(".*")
    # What is fresh may be another's that is being written.
    assert len(files(SpectrumCache(folder))) == WEIGHTS + 1
    os.utime(leftover, (0, 0))
    assert len(files(SpectrumCache(folder))) == WEIGHTS
    decompositions.clear()
    for W in weights:
        assert same(cache.get(W), decompose(W))
    assert not decompositions


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, decompositions: list[tuple[int, ...]]) -> None:
    weights = [random(16, 16, seed) for seed in range(4)]
    SpectrumCache(tmp_path).get(weights[0])
    size = next(tmp_path.iterdir()).stat().st_size
    cache = SpectrumCache(tmp_path, limit_bytes=3 * size)
    aged: set[Path] = set()
    for k in range(3):
        cache.get(weights[k])
        (new,) = set(files(cache)) - aged
        os.utime(new, (k, k))
        aged.add(new)
    cache.get(weights[0])  # the oldest is used again, so the second oldest is now first to go
    cache.get(weights[3])
    assert len(files(cache)) == 3
    decompositions.clear()
    for k in (0, 2, 3):
        cache.get(weights[k])
    assert not decompositions
    cache.get(weights[1])
    assert len(decompositions) == 1
    assert sum(file.stat().st_size for file in files(cache)) <= 3 * size


def test_a_factor_larger_than_the_whole_cache_is_given_and_not_kept(tmp_path: Path) -> None:
    W = random(16, 16)
    cache = SpectrumCache(tmp_path, limit_bytes=100)
    assert same(cache.get(W), decompose(W))
    assert not files(cache)


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_job(tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    W = random(16, 8)
    assert same(cache.get(W), decompose(W))

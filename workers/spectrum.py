"""The singular components of a weight, by the eigenvectors of its smaller Gram matrix.

`W (out, in) = U diag(S) Vh`. Only the singular vectors of the smaller side are kept, since both things that are
asked of a component need no others:

- removing it projects the weight off its vector: `s_i u_i v_i^T = (W v_i) v_i^T = u_i (u_i^T W)`;
- its effect needs only projections of that side (`workers.gradients`).

The Gram matrix is formed and decomposed in float64 (sigma error under 4e-7 of the largest; a float32 Gram errs by
up to 2e-3, and on the small values), several times faster than an SVD. Factors depend on the weight alone, so
they are cached by its content and shared by all jobs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

# Part of every key: raise it when the meaning of a cached factor changes.
FORMAT = b"c2i-spectrum-2"
# A cached factor weighs about half of its matrix; this holds those of some twenty models of 1 B parameters.
CACHE_LIMIT_BYTES = 40 * 2**30
# A file that is being written is renamed within seconds: one older than this was left by a writer that was killed.
LEFTOVER_SECONDS = 3600.0
_WRITING = ".writing-"
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The components of one weight, largest first; rank = min(out, in)."""

    S: Tensor
    """(rank,) float32, or float64 for a float64 weight: singular values."""
    basis: Tensor
    """(rank, rank), of the same type: column i is v_i if `side` is "in", u_i if it is "out"."""
    side: Literal["in", "out"]

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.S.numel()

    def factors(self, W: Tensor, components: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The chosen components as a product: `B @ A = sum_j s_j u_j v_j^T`.

        Args:
            W: (out, in) the weight that was decomposed.
            components: j indices into `S`.

        Returns:
            B (out, j) and A (j, in), float32 (float64 for a float64 weight) on the weight's device.
        """
        wide = W.double() if W.dtype == torch.float64 else W.float()
        Q = self.basis[:, list(components)].to(wide)
        if self.side == "in":
            return wide @ Q, Q.T
        return Q, Q.T @ wide


def decompose(W: Tensor) -> Spectrum:
    """The spectrum of W (out, in), on W's device."""
    out, in_ = W.shape
    side: Literal["in", "out"] = "in" if out >= in_ else "out"
    W64 = W.detach().double()
    gram = W64.T @ W64 if side == "in" else W64 @ W64.T
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    kept = torch.float64 if W.dtype == torch.float64 else torch.float32
    S = eigenvalues.clamp_min(0).sqrt().flip(0).to(kept)
    return Spectrum(S, eigenvectors.flip(1).to(kept).contiguous(), side)


class SpectrumCache:
    """Spectra on disk, one file a weight, named by the weight's content.

    A file is the sha256 of its name and payload, and the payload, written aside and renamed: a torn or altered file,
    or one under another's name, is noticed and computed anew. Shared between processes without a lock, since equal
    keys mean equal content.
    """

    def __init__(self, folder: Path, limit_bytes: int = CACHE_LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.used: dict[str, None] = {}
        """Names of the files of all that was asked for, in that order."""
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_leftovers()

    def get(self, W: Tensor) -> Spectrum:
        """The spectrum of W (out, in): read if it is here, else computed and kept."""
        path = self.folder / _key(W)
        self.used[path.name] = None
        spectrum = _read(path)
        if spectrum is None:
            spectrum = decompose(W)
            self._write(path, spectrum)
        return Spectrum(spectrum.S.to(W.device), spectrum.basis.to(W.device), spectrum.side)

    def _write(self, path: Path, spectrum: Spectrum) -> None:
        payload = save({"S": spectrum.S.cpu(), spectrum.side: spectrum.basis.cpu()})
        if len(payload) + _DIGEST_BYTES > self.limit_bytes:
            return
        # A full disk or a folder that is gone costs the cache, not the job.
        with suppress(OSError):
            self._make_room(len(payload) + _DIGEST_BYTES)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=_WRITING)
            try:
                with os.fdopen(handle, "wb") as file:
                    os.fchmod(handle, 0o644)  # for workers of other users too
                    file.write(_seal(path.name, payload) + payload)
                Path(name).replace(path)
            except OSError:
                Path(name).unlink(missing_ok=True)

    def _drop_leftovers(self) -> None:
        """Remove what killed writers left half written."""
        before = time.time() - LEFTOVER_SECONDS
        for path in self.folder.glob(f"{_WRITING}*"):
            with suppress(OSError):  # another process drops it too
                if path.stat().st_mtime < before:
                    path.unlink()

    def _make_room(self, needed: int) -> None:
        """Drop the least recently used files until `needed` bytes fit under the limit."""
        files = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue  # another process made room too
            files.append((stat.st_mtime, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + needed <= self.limit_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _key(W: Tensor) -> str:
    digest = hashlib.sha256(FORMAT)
    digest.update(f"{W.dtype} {tuple(W.shape)}".encode())
    digest.update(W.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(key: str, payload: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(payload)
    return digest.digest()


def _read(path: Path) -> Spectrum | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with suppress(OSError):  # the time of last use decides what goes first; another user's file can be read alone
        os.utime(path)
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if _seal(path.name, payload) != digest:
        return None
    try:
        tensors = load(payload)
    except SafetensorError:
        return None
    side: Literal["in", "out"] = "in" if "in" in tensors else "out"
    return Spectrum(tensors["S"], tensors[side], side)

"""Which models' weights are decomposed already: a note of the worker's for estimates, which read no weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SPECTRA = "spectra"


def note(cache: Path, revision: str, names: Iterable[str]) -> None:
    """Note the files, in the folder `SPECTRA` of the cache, of all weights of a model. A full disk costs the note."""
    path = _note(cache, revision)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        temporary.write_text("\n".join(names))
        temporary.replace(path)


def is_decomposed(cache: Path, revision: str) -> bool:
    """Whether all of a model's decompositions are still in the cache."""
    try:
        names = _note(cache, revision).read_text().split()
    except OSError:
        return False
    return all((cache / SPECTRA / name).is_file() for name in names)


def _note(cache: Path, revision: str) -> Path:
    return cache / "decomposed" / hashlib.sha256(revision.encode()).hexdigest()

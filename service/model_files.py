"""The files of a model's folder, read within bounds: whoever wrote them may mean harm.

Regular files alone are read, none that leads out of the models' folder, none longer than its kind is in any honest
model.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.errors import UnusableModel

MAX_FILES = 1_000
MAX_JSON_BYTES = 4 * 2**20
# An index names each tensor, a tokenizer.json each token: the largest in use have 9 and 35 MB.
MAX_LISTING_BYTES = 64 * 2**20
MAX_DEPTH = 64
# Folders that transformers looks into.
READ_FOLDERS = ("additional_chat_templates",)
Fingerprint = tuple[tuple[str, int, int, int], ...]
"""Of each file: name, size, and the times at which its content and its entry last changed, in nanoseconds."""


def unusable(reason: str) -> UnusableModel:
    """The error of a model that is refused for what its folder holds."""
    return UnusableModel(f"this model cannot be used: {reason}", param="model")


def shown(name: object) -> str:
    """A name that a folder's author chose, as it may stand in a message: short, on one line, without half a surrogate
    pair."""
    return re.sub(r"[^\w .,:()\[\]-]", "?", str(name))[:120]


def fingerprint(root: Path, folder: Path) -> Fingerprint:
    """Every file of a model's folder; nothing may lead out of the models' folder, nor be anything but a file.

    A submission waits for this: what is no link lies where its folder does, and is not resolved.

    Raises:
        UnusableModel: naming the file.
    """
    inside = Path(os.path.realpath(root))
    entries: list[tuple[str, int, int, int]] = []
    try:
        if not Path(os.path.realpath(folder, strict=True)).is_relative_to(inside):
            raise unusable("its folder is a link that leads out of the models' folder; copy the model there")
        for read in (folder, *(folder / name for name in READ_FOLDERS if (folder / name).is_dir())):
            with os.scandir(read) as found:
                files = list(itertools.islice(found, MAX_FILES + 1))
            if len(files) > MAX_FILES:
                raise unusable(f"its folder holds more than {MAX_FILES:,} files")
            entries += [entry for file in files if (entry := _entry(file, inside))]
    except OSError as error:
        raise unusable(f"its folder cannot be read ({type(error).__name__})") from None
    return tuple(sorted(entries))


def _entry(file: os.DirEntry[str], inside: Path) -> tuple[str, int, int, int] | None:
    if file.is_symlink() and not _leads_inside(file, inside):
        raise unusable(
            f"its file {shown(file.name)} is a link that leads out of the models' folder, or nowhere; copy the file "
            "there"
        )
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        raise unusable(f"its {shown(file.name)} is a pipe, a socket or a device, and no file")
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _leads_inside(file: os.DirEntry[str], inside: Path) -> bool:
    try:
        return Path(os.path.realpath(file, strict=True)).is_relative_to(inside)
    except OSError:
        return False


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file.

    Raises:
        UnusableModel: it is longer than `limit`, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise unusable(f"its {shown(path.name)} has {size:,} bytes; at most {limit:,} are read")
            return file.read(size)
    except OSError as error:
        raise unusable(f"its {shown(path.name)} cannot be read ({type(error).__name__})") from None


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A file that holds one JSON object: no key twice in it, nothing nested beyond reason, no half of a character.

    Raises:
        UnusableModel: naming the file.
    """
    return parse_json(read_bytes(path, limit), shown(path.name))


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """As `read_json`, of what is read already."""
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        for key in walk(value):
            key.encode()
    except (ValueError, RecursionError) as error:
        twice = f": {error}" if isinstance(error, _Twice) else ""
        raise unusable(f"its {name} is not readable JSON{twice}") from None
    if not isinstance(value, dict):
        raise unusable(f"its {name} is not a JSON object")
    return value


class _Twice(ValueError):
    """Two readers may take different ones of two values."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _Twice(f"it has `{shown(key)}` twice")
    return value


def walk(value: object) -> Iterator[str]:
    """All keys and texts within a decoded JSON value.

    Raises:
        RecursionError: nested deeper than `MAX_DEPTH`.
    """
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for one in level:
            if isinstance(one, str):
                yield one
            elif isinstance(one, dict):
                yield from one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return
        level = inner
    raise RecursionError

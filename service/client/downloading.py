"""Files of a job onto the disk: each is whole or not there, checked by its sha256, and resumed where it was cut off.

What has arrived of `weights.safetensors` is kept beside it as `weights.safetensors.SHA.part`, also when the process
dies: the next download goes on from there (`Range`, with `If-Range` so that nobody joins two files).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx

from service.answers import FileOut
from service.client.asking import RETRY_SECONDS, Terms, open_stream
from service.client.operations import files
from service.client.steps import Flow, Pause, Request, read, work
from service.errors import InternalError
from service.points import point_path

OnBytes = Callable[[FileOut, int], None]
"""Called with a file and how many of its bytes are there, as they come and at its end."""


def download(
    terms: Terms,
    job_id: str,
    folder: Path | str,
    *,
    only: Sequence[str] = ("",),
    point: int | None = None,
    on_bytes: OnBytes = lambda file, held: None,
) -> Flow[list[Path]]:
    """Fetch a job's files, those whose path begins with one of `only`; what is there already is not fetched again.

    Args:
        point: of `compress`, the round whose model alone is fetched, with the report.

    Raises:
        NotFound: the job has no such point.
        InternalError: a file is not what its sha256 says, or would not lie in the folder.
    """
    root = Path(folder)
    there = yield from files(terms, job_id)
    if point is not None:
        only = (point_path([file.path for file in there], point), "report.")
    wanted = [file for file in there if file.path.startswith(tuple(only))]
    for file in wanted:  # all of them, before the first is fetched
        _check_place(file, root)
    for file in wanted:
        target = root / file.path
        if not (yield from work(partial(_is_whole, target, file.sha256))):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield from _fetch(terms, file, target, on_bytes)
        on_bytes(file, file.bytes)
    return [root / file.path for file in wanted]


def _check_place(file: FileOut, root: Path) -> None:
    if not file.url.startswith("/v1/"):  # the key is sent with it
        raise InternalError("the service names a file on another server; nothing is fetched")
    if not (root / file.path).resolve().is_relative_to(root.resolve()):
        raise InternalError("the service names a file outside of the job's folder; nothing is fetched")


def _fetch(terms: Terms, file: FileOut, target: Path, on_bytes: OnBytes) -> Flow[None]:
    part = target.with_name(f"{target.name}.{file.sha256[:12]}.part")
    resumed = _size(part) > 0
    part.touch()
    yield from _complete(terms, file, part, on_bytes)
    whole = yield from work(partial(_is_whole, part, file.sha256))
    if resumed and not whole:  # what was there of it was damaged
        part.unlink()
        yield from _complete(terms, file, part, on_bytes)
        whole = yield from work(partial(_is_whole, part, file.sha256))
    if not whole:
        part.unlink()
        raise InternalError(f"{target} was damaged on its way; download it again")
    part.replace(target)


def _complete(terms: Terms, file: FileOut, part: Path, on_bytes: OnBytes) -> Flow[None]:
    """Fetch what is lacking of a file, however often it is cut off, as long as it grows."""
    stopped_at: float | None = None
    while (held := _size(part)) != file.bytes:
        try:
            yield from _append(terms, file, part, held, on_bytes)
        except httpx.TransportError as error:
            grew = _size(part) > held
            stopped_at = time.monotonic() if grew or stopped_at is None else stopped_at
            if time.monotonic() - stopped_at > terms.patience:
                raise terms.unreachable(error) from None
            yield Pause(RETRY_SECONDS)


def _append(terms: Terms, file: FileOut, part: Path, held: int, on_bytes: OnBytes) -> Flow[None]:
    """One request's worth of a file."""
    headers = {"Accept-Encoding": "identity"}
    if 0 < held < file.bytes:
        headers |= {"Range": f"bytes={held}-", "If-Range": f'"{file.sha256}"'}
    response = yield from open_stream(terms, Request("GET", file.url, headers=headers))
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        held = 0
    with part.open("ab" if held else "wb") as out:
        while piece := (yield from read()):
            held += len(piece)
            if held > file.bytes:
                raise InternalError(f"the service sends more of {file.path} than it has")
            out.write(piece)
            on_bytes(file, held)
        out.flush()
        os.fsync(out.fileno())
    if held < file.bytes:
        raise InternalError(f"the service sends less of {file.path} than it has")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256

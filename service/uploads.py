"""Files that clients upload to make jobs of, on disk.

    artifacts/uploads/OWNER/ID.jsonl    the file
    artifacts/uploads/OWNER/ID.json     its name and size and when it ends; `_` is the owner where no keys are in force

The second is written last and goes first: what is seen is whole. A job holds a copy of its examples, so a file may go
at any time. IDs sort by the time at which they were made.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from service.artifacts import ArtifactStore, write_whole
from service.errors import Conflict, NotFound
from service.records import new_job_id
from service.strict import Strict

FILE_ID = re.compile(r"file-[0-9a-z]{20}")
# Of each key; without keys, of all. A file is at most as large as the body of a job.
MAX_FILES = 1_000
MAX_BYTES = 1_000_000_000
# What a request that was cut off leaves behind is older than any that goes on.
LEFTOVER = timedelta(days=1)


class Upload(Strict):
    """A file that is there. Times are seconds of the epoch."""

    id: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int


class Uploads:
    """The files of everybody."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._root = store.uploads

    def put(self, owner: str, filename: str, content: bytes, lifetime: timedelta) -> Upload:
        """Store a file, for so long.

        Raises:
            Conflict: the owner has as many, or as many bytes of them, as it may.
            Unavailable: the disk has no room.
        """
        there = self.list_files(owner)
        if len(there) >= MAX_FILES or sum(one.bytes for one in there) + len(content) > MAX_BYTES:
            raise Conflict(
                f"you have {len(there):,} files; at most {MAX_FILES:,}, of {MAX_BYTES / 1e9:g} GB together, are kept: "
                "delete some that no job needs any more",
                param="file",
            )
        self._store.check_room(len(content))
        now = int(time.time())
        upload = Upload(
            id=f"file-{new_job_id().removeprefix('job_')}",
            filename=filename,
            bytes=len(content),
            created_at=now,
            expires_at=now + int(lifetime.total_seconds()),
        )
        folder = self._folder(owner)
        folder.mkdir(exist_ok=True)
        # No rename: nobody looks for the file before its record is there.
        with (folder / f"{upload.id}.jsonl").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write_whole(folder / f"{upload.id}.json", upload.model_dump_json().encode())
        return upload

    def list_files(self, owner: str | None) -> list[Upload]:
        """An owner's files, everybody's for None, the oldest first."""
        folders = _entries(self._root) if owner is None else [self._folder(owner)]
        there = [self._read(path) for folder in folders for path in _entries(folder) if path.suffix == ".json"]
        return sorted((one for one in there if one is not None), key=lambda one: one.id)

    def get(self, file_id: str, owner: str | None) -> Upload:
        """One file.

        Raises:
            NotFound: there is none, it has expired, or it belongs to another.
        """
        return self._find(file_id, owner)[0]

    def open(self, file_id: str, owner: str | None) -> BinaryIO:
        """Its content, which stays whole if it is deleted meanwhile.

        Raises:
            NotFound: as for `get`.
        """
        with suppress(FileNotFoundError):
            return self._find(file_id, owner)[1].with_suffix(".jsonl").open("rb")
        raise _not_found(file_id)

    def delete(self, file_id: str, owner: str | None) -> None:
        """Remove a file.

        Raises:
            NotFound: as for `get`.
        """
        _remove(self._find(file_id, owner)[1])

    def expire(self) -> None:
        """Remove what has ended, and what a request that was cut off has left."""
        leftover = time.time() - LEFTOVER.total_seconds()
        for folder in _entries(self._root):
            for path in _entries(folder):
                with suppress(FileNotFoundError):
                    if path.suffix == ".json":
                        if not path.name.startswith(".") and self._read(path) is None:
                            _remove(path)
                    elif path.stat().st_mtime < leftover and not path.with_suffix(".json").exists():
                        path.unlink()

    def _find(self, file_id: str, owner: str | None) -> tuple[Upload, Path]:
        if FILE_ID.fullmatch(file_id):
            for folder in _entries(self._root) if owner is None else [self._folder(owner)]:
                path = folder / f"{file_id}.json"
                if upload := self._read(path):
                    return upload, path
        raise _not_found(file_id)

    def _read(self, path: Path) -> Upload | None:
        """None for what is gone, meanwhile or by its time."""
        if path.name.startswith("."):
            return None
        try:
            upload = Upload.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        return upload if upload.expires_at > time.time() else None

    def _folder(self, owner: str) -> Path:
        return self._root / (owner or "_")


def _not_found(file_id: str) -> NotFound:
    return NotFound(f"no file {file_id[:64]}; files are kept for a time and then forgotten", param="file_id")


def _remove(record: Path) -> None:
    record.unlink(missing_ok=True)
    record.with_suffix(".jsonl").unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError):
        yield from list(folder.iterdir())

"""What jobs take in and give out, on disk.

    artifacts/jobs/ID/input.json               the job's spec
    artifacts/jobs/ID/ATTEMPT.manifest.json    what the attempt published: path, bytes and sha256 of each file
    artifacts/blobs/ab/abcd...                 contents by their sha256, shared by all jobs
    artifacts/uploads/                         files that jobs are made of (`service.uploads`)
    artifacts/work/ID.ATTEMPT/                 where an attempt writes before it publishes

Files appear by a rename after an fsync, and the manifest after all its blobs: what is seen is whole. A manifest
belongs to an attempt, and readers ask for the attempt of a job that succeeded, so that a late process of an earlier
attempt publishes what nobody ever reads. A blob that no manifest names is swept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import TypeAdapter

from service.errors import NotFound, Unavailable
from service.jobs import ArtifactFile, JobSpec

CHUNK_BYTES = 1 << 20
_MANIFEST = TypeAdapter(list[ArtifactFile])


class ArtifactStore:
    """A local folder. Other stores come with the second one."""

    def __init__(self, root: Path) -> None:
        self._jobs = root / "jobs"
        self._blobs = root / "blobs"
        self._work = root / "work"
        self._lock = root / "lock"
        self.uploads = root / "uploads"
        """The folder of `service.uploads`."""
        for folder in (self._jobs, self._blobs, self._work, self.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raises Unavailable where the disk cannot be written: a byte must come to rest there."""
        try:
            with tempfile.TemporaryFile(dir=self._work) as file:
                file.write(b"c2i")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Unavailable(f"the artifact store cannot be written: {os.strerror(error.errno or 0)}") from None

    def disk_bytes(self) -> tuple[int, int]:
        """Free bytes of the store's disk, and its size."""
        disk = shutil.disk_usage(self._work)
        return disk.free, disk.total

    # --- inputs ----------------------------------------------------------------------------------------------

    def put_input(self, job_id: str, spec: JobSpec) -> None:
        """Store a job's spec, before the job is queued."""
        folder = self._jobs / job_id
        folder.mkdir(exist_ok=True)
        # No rename, which would cost a second sync: nobody looks for the file before the job's record is there.
        with (folder / "input.json").open("wb") as file:
            file.write(spec.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())

    def get_input(self, job_id: str) -> JobSpec:
        """The spec that was stored.

        Raises:
            NotFound: it was deleted.
        """
        try:
            return JobSpec.parse_json((self._jobs / job_id / "input.json").read_bytes())
        except FileNotFoundError:
            raise NotFound("the job's examples are not stored any more") from None

    # --- publishing ------------------------------------------------------------------------------------------

    @contextmanager
    def workspace(self, job_id: str, attempt: int) -> Iterator[Path]:
        """An empty folder for the attempt's files, on the store's own disk, removed at the end."""
        folder = self._work / f"{job_id}.{attempt}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            self.clear_workspace(job_id, attempt)

    def check_room(self, needed: int) -> None:
        """Raises Unavailable where the disk has no room for so many bytes."""
        free, _ = self.disk_bytes()
        if free < needed:
            raise Unavailable(
                f"the server's disk has {free / 1e9:.1f} GB left and the job needs {needed / 1e9:.1f} GB; try again "
                "when there is room"
            )

    def workspace_bytes(self, job_id: str, attempt: int) -> int:
        """What an attempt's unpublished files take on the disk now."""
        total, folders = 0, [self._work / f"{job_id}.{attempt}"]
        while folders:
            with suppress(OSError):  # a file or a folder that is gone meanwhile
                for entry in os.scandir(folders.pop()):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        with suppress(OSError):
                            total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total

    def clear_workspace(self, job_id: str, attempt: int) -> None:
        """Remove what a killed attempt left half-written."""
        shutil.rmtree(self._work / f"{job_id}.{attempt}", ignore_errors=True)

    def publish(self, job_id: str, attempt: int, folder: Path) -> list[ArtifactFile]:
        """Move everything in `folder` into the store and then write the attempt's manifest."""
        with self._locked(fcntl.LOCK_SH):
            files = [
                self._store(path, path.relative_to(folder).as_posix())
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            write_whole(self._manifest(job_id, attempt), _MANIFEST.dump_json(files))
        return files

    def withdraw(self, job_id: str, attempt: int) -> None:
        """Unpublish an attempt that came too late."""
        self._manifest(job_id, attempt).unlink(missing_ok=True)

    def _store(self, path: Path, name: str) -> ArtifactFile:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        blob = self._blob(digest)
        blob.parent.mkdir(exist_ok=True)
        path.chmod(0o444)
        path.replace(blob)
        _sync_folder(blob.parent)
        return ArtifactFile(path=name, bytes=size, sha256=digest)

    # --- reading ---------------------------------------------------------------------------------------------

    def files(self, job_id: str, attempt: int) -> list[ArtifactFile]:
        """What the attempt published.

        Raises:
            NotFound: nothing.
        """
        try:
            return _MANIFEST.validate_json(self._manifest(job_id, attempt).read_bytes())
        except FileNotFoundError:
            raise NotFound("the job has no artifacts") from None

    def find(self, job_id: str, attempt: int, path: str) -> ArtifactFile:
        """One published file by its path in the manifest; a path is compared and never opened.

        Raises:
            NotFound: the manifest has no such file.
        """
        for file in self.files(job_id, attempt):
            if file.path == path:
                return file
        raise NotFound("the job has no such file; `GET /v1/jobs/{id}/files` lists them", param="path")

    def open(self, file: ArtifactFile) -> BinaryIO:
        """A published file's contents; what is open stays whole if its job is deleted.

        Raises:
            NotFound: its job was deleted at this very moment.
        """
        try:
            return self._blob(file.sha256).open("rb")
        except FileNotFoundError:
            raise NotFound("the job's files have been deleted") from None

    def link(self, file: ArtifactFile, path: Path) -> None:
        """Have a published file at a path as well, by a symbolic link.

        Raises:
            NotFound: its job was deleted.
        """
        blob = self._blob(file.sha256).absolute()
        if not blob.exists():
            raise NotFound("the job's files have been deleted")
        path.symlink_to(blob)

    # --- removing --------------------------------------------------------------------------------------------

    def discard_input(self, job_id: str) -> None:
        """Remove the input of a job that was not created after all."""
        shutil.rmtree(self._jobs / job_id, ignore_errors=True)

    def delete(self, *job_ids: str) -> None:
        """Remove inputs and manifests, then what no other job shares."""
        for job_id in job_ids:
            shutil.rmtree(self._jobs / job_id, ignore_errors=True)
        self.sweep()

    def older_than(self, age: timedelta, *, unpublished: bool = False) -> list[str]:
        """Jobs whose files were last touched longer ago.

        Args:
            unpublished: only those that have an input alone.
        """
        limit = time.time() - age.total_seconds()
        return [
            folder.name
            for folder in _entries(self._jobs)
            if _touched(folder) < limit
            and not (unpublished and any(entry.name.endswith(".manifest.json") for entry in _entries(folder)))
        ]

    def workspaces(self) -> set[tuple[str, int]]:
        """Job and attempt of each workspace there is."""
        names = (PurePosixPath(folder.name) for folder in _entries(self._work))
        return {(name.stem, int(name.suffix[1:])) for name in names if name.suffix[1:].isdigit()}

    def sweep(self) -> None:
        """Remove blobs that no manifest names, and manifests that a dead process left half-written.

        Not now where something is being published.
        """
        try:
            with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
                named = {file.sha256 for manifest in self._manifests() for file in _MANIFEST.validate_json(manifest)}
                blobs = [blob for folder in _entries(self._blobs) for blob in _entries(folder)]
                halves = [half for job in _entries(self._jobs) for half in _entries(job) if half.name.startswith(".")]
                for path in halves + [blob for blob in blobs if blob.name not in named]:
                    path.unlink(missing_ok=True)
        except BlockingIOError:
            return

    # --- names and locks -------------------------------------------------------------------------------------

    def _manifests(self) -> Iterator[bytes]:
        """Every manifest there is, while other jobs are being deleted."""
        for folder in _entries(self._jobs):
            for entry in _entries(folder):
                if entry.name.endswith(".manifest.json") and not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        yield entry.read_bytes()

    def _manifest(self, job_id: str, attempt: int) -> Path:
        return self._jobs / job_id / f"{attempt}.manifest.json"

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        """Publishers share the lock, a sweep has it alone: it never removes a blob that is about to be named."""
        with self._lock.open("w") as lock:
            fcntl.flock(lock, mode)
            yield


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT)


def error_number(error: BaseException) -> int | None:
    """The system's number of an error; what is written in Rust, safetensors say, tells it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it is gone meanwhile."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _touched(path: Path) -> float:
    """When it was changed last; now where it is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all, and there after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What must hold after every blow. Each check returns what is wrong, in words; nothing wrong is an empty list."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx

from service.queue import MAX_CRASHES
from tests.chaos.keys import find_stray_keys
from tests.chaos.world import MARK, TERMINAL, Accepted, World

# What is on its way out may take so long.
QUIET_SECONDS = 15.0
# What the service clears in its own time: of requests that were cut off, and of writers that were killed.
FOR_LATER = ("files of no job", "half-written", "a blob that no job names")
DAY_SECONDS = 100_000
_loading = threading.Lock()


def settle(check: Callable[[], list[str]], seconds: float = QUIET_SECONDS) -> list[str]:
    """What a check still finds after a time in which it might have found nothing."""
    deadline = time.monotonic() + seconds
    while (found := check()) and time.monotonic() < deadline:
        threading.Event().wait(0.2)
    return found


# --- jobs --------------------------------------------------------------------------------------------------------


def check_end(job: Accepted, record: dict[str, Any] | None, events: list[dict[str, Any]]) -> list[str]:
    """That an accepted job ended as it may, after as many attempts as it may."""
    if record is None:
        return [] if job.may_be_gone else [f"{job.id} is gone"]
    status, error = record["status"], record["error"]
    found = []
    if status not in TERMINAL:
        found.append(f"{job.id} has not ended: {status}, attempt {record['attempt']}, {record['progress']}")
    if status == "cancelled" and not job.may_be_cancelled:
        found.append(f"{job.id} is cancelled, which nobody asked for")
    if status == "failed" and (error["code"] not in job.may_fail or not error["message"]):
        found.append(f"{job.id} failed: {error}")
    messages = [event["message"] for event in events]
    attempts = [int(told[1]) for message in messages if (told := re.fullmatch(r"attempt (\d+) began", message))]
    if attempts != list(range(1, len(attempts) + 1)) or record["attempt"] != len(attempts):
        found.append(f"{job.id} counts its attempts {attempts}, and {record['attempt']} in its record")
    ended = [event["status"] for event in events if event["kind"] == "status" and event["status"] in TERMINAL]
    if status in TERMINAL and ended != [status]:
        found.append(f"{job.id} ended as {ended}")
    crashes = sum(is_crash(message) for message in messages)
    if crashes >= MAX_CRASHES:
        found.append(f"{job.id} was tried again after {crashes} crashes")
    return found


def is_crash(message: str) -> bool:
    """Whether an event says that an attempt's process or worker died and another attempt is to come."""
    return message.startswith("queued again: its ") and not re.search("was stopped|was cut off", message)


def check_artifacts(http: httpx.Client, job_id: str, *, load: bool) -> tuple[list[str], str]:
    """That every file is what the manifest says, and that the model loads; and the adapter's sha256."""
    found = []
    files = {file["path"]: file for file in http.get(f"/v1/jobs/{job_id}/files").json()["data"]}
    if not {"report.json", "model/model.safetensors"} <= files.keys():
        return [f"{job_id} published {sorted(files)} only"], ""
    for path, file in files.items():
        content = http.get(file["url"]).content
        if hashlib.sha256(content).hexdigest() != file["sha256"] or len(content) != file["bytes"]:
            found.append(f"{job_id}: {path} is not what its manifest says")
    archive = zipfile.ZipFile(io.BytesIO(http.get(f"/v1/jobs/{job_id}/model.zip").content))
    for name in archive.namelist():
        inner = name.partition("/")[2]
        if inner in files and hashlib.sha256(archive.read(name)).hexdigest() != files[inner]["sha256"]:
            found.append(f"{job_id}: {name} in the archive is not what the manifest says")
    if load and not found:
        try:
            _load(archive)
        except Exception as error:
            found.append(f"{job_id}: the model does not load: {error!r}")
    return found, files.get("adapter/adapter_model.safetensors", {"sha256": ""})["sha256"]


def _load(archive: zipfile.ZipFile) -> None:
    """As a user does, and a token of it."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    with _loading, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        (model,) = Path(folder).glob("*/model")
        loaded = AutoModelForCausalLM.from_pretrained(model)
        logits = loaded(torch.tensor([[1, 2, 3]])).logits
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("its logits are not finite")


# --- what is left ------------------------------------------------------------------------------------------------


def find_stray_processes(mark: str, expected: Iterable[int]) -> list[str]:
    """Processes of a world that are none of its parts."""
    found, wanted = [], set(expected)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(folder.name) not in wanted and command:
            found.append(f"process {folder.name} is left: {command}")
    return found


def find_stray_files(data: Path, jobs: set[str]) -> list[str]:
    """Files of the store that belong to no job, and what was left half-written. For a quiet service."""
    artifacts = data / "artifacts"
    found = [f"a workspace is left: {path.name}" for path in (artifacts / "work").iterdir()]
    named: set[str] = set()
    for folder in (artifacts / "jobs").iterdir():
        if folder.name not in jobs:
            found.append(f"files of no job: {folder.name} holds {sorted(path.name for path in folder.iterdir())}")
            continue
        for path in folder.iterdir():
            if path.name.startswith("."):
                found.append(f"half-written: {folder.name}/{path.name}")
            elif path.name.endswith(".manifest.json"):
                named |= {file["sha256"] for file in json.loads(path.read_text())}
    blobs = {path.name for path in (artifacts / "blobs").glob("*/*")}
    found += [f"a blob that no job names: {name}" for name in sorted(blobs - named)]
    found += [f"a blob is missing: {name}" for name in sorted(named - blobs)]
    return found


def find_strays_beside(folder: Path, data: Path, temporary: Path, sockets: Iterable[str]) -> list[str]:
    """Temporary files, sockets and half-written factors."""
    found = [f"a temporary file is left: {path.name}" for path in temporary.iterdir()]
    found += [f"half-written: cache/{path.name}" for path in (data / "cache").rglob(".*")]
    for path in folder.rglob("*"):
        if stat.S_ISSOCK(path.lstat().st_mode) and path.name not in sockets:
            found.append(f"a socket is left: {path.name}")
    return found


# --- all of it ---------------------------------------------------------------------------------------------------


class Checks:
    """All checks of one world, and what they remember from round to round."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._adapters: dict[int, str] = {}

    def of_jobs(self) -> list[str]:
        """Every accepted job, when it should have ended."""
        world, found = self._world, []
        loaded = False
        for job in world.jobs:
            record = world.job(job.id)
            found += check_end(job, record, world.events(job.id))
            if record and record["status"] == "succeeded":
                wrong, adapter = check_artifacts(world.http, job.id, load=not loaded)
                loaded = True
                if self._adapters.setdefault(job.kind, adapter) != adapter:
                    wrong.append(f"{job.id} has another adapter than all jobs of its kind before")
                found += wrong
        return found + [f"two processes on one job: {name}, {pids}" for name, pids in self._doubled()]

    def _doubled(self) -> list[tuple[str, list[int]]]:
        doubled = self._world.watcher.doubled
        return [(name, sorted(doubled.pop(name))) for name in list(doubled)]

    def of_rest(self) -> list[str]:
        """Redis, disk and processes, once nothing happens any more."""
        found = settle(self._left)
        if found and all(problem.startswith(FOR_LATER) for problem in found):
            self._let_a_day_pass()
            found = settle(self._left)
        found += self._world.faults_of_server
        self._world.faults_of_server = []
        return found

    def _left(self) -> list[str]:
        world = self._world
        found = find_stray_keys(world.client)
        found += find_stray_processes(world.mark, [part.pid for part in world.parts])
        found += find_stray_files(world.data, {job.id for job in world.jobs})
        return found + find_strays_beside(world.folder, world.data, world.temporary, ["redis.sock"])

    def _let_a_day_pass(self) -> None:
        """Make what was left look old, and let the service clean: the API when it starts, a job the cache."""
        world = self._world
        jobs = {job.id for job in world.jobs}
        folders = [folder for folder in (world.data / "artifacts" / "jobs").iterdir() if folder.name not in jobs]
        for path in [*folders, *(world.data / "cache").rglob(".*")]:
            os.utime(path, (time.time() - DAY_SECONDS,) * 2)
        world.api.signal(signal.SIGTERM)
        world.api.wait(30)
        world.revive()
        world.await_ready()
        world.submit(random.Random())
        world.await_ends()

    def forget_jobs(self) -> list[str]:
        """Delete every job, and see that nothing of it is left."""
        world = self._world
        found = []
        for job in world.jobs:
            answer = world.request("DELETE", f"/v1/jobs/{job.id}")
            if answer.status_code not in (204, 404):
                found.append(f"{job.id} cannot be deleted: {answer.text}")
        world.jobs = []
        return found + self.of_rest()

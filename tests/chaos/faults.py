"""The blows. Each function strikes one, sees to it that what was killed is started again, and tells whom it hit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.queue import LEASE_SECONDS
from tests.chaos.world import GRACE_SECONDS, MODEL, TERMINAL, Accepted, Part, World
from tests.live import spec, wait_until

WORK_SECONDS = 90.0


class Impossible(Exception):
    """A blow cannot be struck on this machine; says why."""


@dataclass
class Blow:
    """What was struck, and what has to come of it."""

    at: float
    """When, in seconds of the epoch: recovery is counted from here."""
    hit: dict[str, int] = field(default_factory=dict)
    """Jobs whose attempt of this number cannot have survived: another one begins, or the job ends."""
    spared: dict[str, int] = field(default_factory=dict)
    """Jobs whose attempt of this number must have survived."""
    problems: list[str] = field(default_factory=list)
    """What was wrong already."""


Fault = Callable[[World, random.Random], Blow]


# --- processes killed --------------------------------------------------------------------------------------------


def kill_child(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a job's process."""
    job_id, pid = _pick_at_work(world, rng)
    blow = Blow(time.time(), _attempts(world, [job_id]))
    _kill(pid)
    return blow


def kill_child_thrice(world: World, rng: random.Random) -> Blow:
    """SIGKILL of one job's process in each of its attempts: it fails and says why."""
    job_id, _ = _pick_at_work(world, rng)
    job = next(job for job in world.jobs if job.id == job_id)
    job.may_fail.add("worker_died")
    killed: set[int] = set()
    blow = Blow(time.time())
    while len(killed) < 3 and not _ended(world, job_id):
        pid = world.at_work().get(job_id)
        if pid is None or pid in killed:
            threading.Event().wait(0.05)
            continue
        threading.Event().wait(rng.uniform(0, 1))
        blow = Blow(time.time(), _attempts(world, [job_id]))
        _kill(pid)
        killed.add(pid)
    return blow


def kill_worker(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a worker that has a job."""
    worker, jobs = _pick_busy(world, rng)
    blow = Blow(time.time(), _attempts(world, jobs))
    worker.kill()
    world.revive()
    return blow


def kill_api(world: World, _: random.Random) -> Blow:
    """SIGKILL of the API; the jobs go on."""
    blow = Blow(time.time(), spared=_attempts(world, world.at_work()))
    world.api.kill()
    world.revive()
    return blow


def kill_redis(world: World, _: random.Random) -> Blow:
    """SIGKILL of Redis, which comes back with its append-only file; the jobs go on."""
    blow = Blow(time.time(), spared=_attempts(world, world.at_work()))
    world.redis.kill()
    world.revive()
    return blow


def kill_worker_and_redis(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a worker that has a job, and of Redis at the same moment."""
    worker, jobs = _pick_busy(world, rng)
    blow = Blow(time.time(), _attempts(world, jobs))
    for part in rng.sample([worker, world.redis], 2):
        part.kill()
    world.revive()
    return blow


def power_cut(world: World, _: random.Random) -> Blow:
    """SIGKILL of everything at once."""
    blow = Blow(time.time(), _attempts(world, world.at_work()))
    for part in world.parts:
        part.signal(signal.SIGKILL)
    for part in world.parts:
        part.wait(30)
    world.revive()
    return blow


# --- processes told to stop --------------------------------------------------------------------------------------


def stop_worker(world: World, rng: random.Random) -> Blow:
    """SIGTERM of a worker that has a job, which it finishes or hands back."""
    worker, jobs = _pick_busy(world, rng)
    blow = Blow(time.time(), _attempts(world, jobs))
    blow.problems += _stop(worker)
    world.revive()
    return blow


def stop_everything(world: World, rng: random.Random) -> Blow:
    """SIGTERM of API and workers in any order, then of Redis."""
    blow = Blow(time.time(), _attempts(world, world.at_work()))
    parts = rng.sample([world.api, *world.workers], 3)
    for part in parts:
        part.signal(signal.SIGTERM)
    for part in [*parts, world.redis]:
        blow.problems += _stop(part)
    world.revive()
    return blow


# --- processes and Redis that stand still ------------------------------------------------------------------------


def freeze_worker(world: World, rng: random.Random) -> Blow:
    """SIGSTOP of a worker for longer than its lease: another one takes its job, and it must not."""
    worker, jobs = _pick_busy(world, rng)
    blow = Blow(time.time(), _attempts(world, jobs))
    _freeze(worker, LEASE_SECONDS + rng.uniform(4, 12))
    return blow


def freeze_worker_briefly(world: World, rng: random.Random) -> Blow:
    """SIGSTOP of a worker for less than its lease: its job goes on."""
    worker, jobs = _pick_busy(world, rng)
    blow = Blow(time.time(), spared=_attempts(world, jobs))
    _freeze(worker, rng.uniform(2, LEASE_SECONDS / 2))
    return blow


def silence_redis(world: World, _: random.Random) -> Blow:
    """A Redis that takes connections and commands and answers nothing for ten seconds; the jobs go on."""
    spared = _attempts(world, world.at_work())
    _freeze(world.redis, 10)
    return Blow(time.time(), spared=spared)


def lose_redis(world: World, rng: random.Random) -> Blow:
    """No Redis for longer than any lease: no job outlives its lease, and all run again."""
    hit = _attempts(world, world.at_work())
    world.redis.kill()
    threading.Event().wait(LEASE_SECONDS + rng.uniform(1, 8))
    world.revive()
    return Blow(time.time(), hit)


# --- disk --------------------------------------------------------------------------------------------------------


def fill_disk(world: World, rng: random.Random) -> Blow:
    """Not a byte left on the disk for some seconds: no job is accepted, and those that run may fail for that."""
    if not world.own_disk:
        raise Impossible("a file system of its own cannot be mounted here (it takes root)")
    for job in world.jobs:
        job.may_fail.add("unavailable")
    filler = world.data / "filler"
    problems = []
    try:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 20)):
                file.flush()
        with filler.open("ab") as file, contextlib.suppress(OSError):
            while os.write(file.fileno(), bytes(512)):
                pass
        answer = world.http.post("/v1/jobs", json=spec(model=MODEL))
        if answer.status_code != 503 or answer.json()["error"]["code"] != "unavailable":
            problems.append(f"a job on a full disk is answered with {answer.status_code} {answer.text[:200]}")
        threading.Event().wait(rng.uniform(3, 10))
    finally:
        filler.unlink()
    return Blow(time.time(), problems=problems)


def corrupt_cache(world: World, rng: random.Random) -> Blow:
    """Factors altered, cut off, emptied and put under each other's names: the next job must not take them."""
    wait_until(lambda: _factors(world), WORK_SECONDS, "factors are cached")
    world.await_ends()
    for path in _factors(world):
        content = bytearray(path.read_bytes())
        match rng.choice(["alter", "cut", "empty", "swap", "leave"]):
            case "alter":
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case "cut":
                del content[rng.randrange(len(content)) :]
            case "empty":
                content.clear()
            case "swap":
                content = bytearray(rng.choice(_factors(world)).read_bytes())
        path.write_bytes(content)
    world.submit(rng)
    return Blow(time.time())


# --- clients -----------------------------------------------------------------------------------------------------


def drop_downloads(world: World, rng: random.Random) -> Blow:
    """Clients that go away in the middle of a download, some without a word: no file stays open."""
    finished = wait_until(lambda: _succeeded(world), WORK_SECONDS, "a job has succeeded")
    for _ in range(8):
        path = rng.choice(["files/model/model.safetensors", "model.zip"])
        _download_some(world.port, f"/v1/jobs/{finished}/{path}", rng.randrange(200_000), reset=rng.random() < 0.5)
    blow = Blow(time.time())
    try:
        wait_until(lambda: not _open_blobs(world), 20, "no artifact is open")
    except AssertionError:
        blow.problems.append(f"files stay open: {_open_blobs(world)}")
    return blow


def cancel_jobs(world: World, rng: random.Random) -> Blow:
    """Every job is cancelled at its own moment, by three clients at once."""
    for job in world.jobs:
        job.may_be_cancelled = True

    def cancel(job: Accepted, after: float) -> str | None:
        threading.Event().wait(after)
        answer = world.request("POST", f"/v1/jobs/{job.id}/cancel")
        return None if answer.status_code in (200, 409) else f"cancel is answered with {answer.text[:200]}"

    moments = [(job, rng.uniform(0, 4)) for job in world.jobs for _ in range(3)]
    blow = Blow(time.time(), _attempts(world, world.at_work()))
    blow.problems += _at_once(cancel, moments)
    return blow


def delete_jobs(world: World, rng: random.Random) -> Blow:
    """Jobs are cancelled, and deleted as soon as that is allowed, by two clients at once; a third one still reads."""
    finished = wait_until(lambda: _succeeded(world), WORK_SECONDS, "a job has succeeded")
    world.submit(rng)
    for job in world.jobs:
        job.may_be_cancelled = job.may_be_gone = True

    def delete(job_id: str, after: float) -> str | None:
        threading.Event().wait(after)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            world.request("POST", f"/v1/jobs/{job_id}/cancel")
            answer = world.request("DELETE", f"/v1/jobs/{job_id}")
            if answer.status_code in (204, 404):
                return None
            threading.Event().wait(0.02)
        return f"{job_id} cannot be deleted: {answer.text[:200]}"

    def read(path: str) -> str | None:
        while (answer := world.request("GET", f"/v1/jobs/{finished}/{path}")).is_success:
            if len(answer.content) != int(answer.headers["content-length"]):
                return f"{path} is cut off"
        return None if answer.status_code in (404, 409) else f"{path} is answered with {answer.text[:200]}"

    blow = Blow(time.time(), _attempts(world, world.at_work()))
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, path) for path in ("model.zip", "files/model/model.safetensors")]
        moments = [(job.id, rng.uniform(0.2, 3)) for job in world.jobs for _ in range(2)]
        blow.problems += _at_once(delete, moments)
        blow.problems += [told for reader in readers if (told := reader.result())]
    return blow


def submit_in_an_outage(world: World, rng: random.Random) -> Blow:
    """API or Redis is killed under clients that submit and try again with the same `Idempotency-Key`."""
    part = rng.choice([world.api, world.redis])
    seeds = [rng.getrandbits(64) for _ in range(6)]

    def submit(seed: int) -> str | None:
        own = random.Random(seed)
        threading.Event().wait(own.uniform(0, 0.5))
        world.submit(own)
        return None

    with ThreadPoolExecutor(len(seeds)) as pool:
        answers = [pool.submit(submit, seed) for seed in seeds]
        threading.Event().wait(rng.uniform(0, 0.5))
        blow = Blow(time.time())
        part.kill()
        world.revive()
        for answer in answers:
            answer.result()
    listed = _listed(world)
    blow.problems += [f"a job that nobody was told of: {job_id}" for job_id in listed - {job.id for job in world.jobs}]
    return blow


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_child,
        kill_child_thrice,
        kill_worker,
        kill_api,
        kill_redis,
        kill_worker_and_redis,
        power_cut,
        stop_worker,
        stop_everything,
        freeze_worker,
        freeze_worker_briefly,
        silence_redis,
        lose_redis,
        fill_disk,
        corrupt_cache,
        drop_downloads,
        cancel_jobs,
        delete_jobs,
        submit_in_an_outage,
    )
}


# --- how ---------------------------------------------------------------------------------------------------------


def _pick_at_work(world: World, rng: random.Random) -> tuple[str, int]:
    """A job that a process works on, and its pid; a new one where all have ended."""
    deadline = time.monotonic() + WORK_SECONDS
    while not (at_work := world.at_work()):
        if all(_ended(world, job.id) for job in world.jobs):
            world.submit(rng)
        if time.monotonic() > deadline:
            raise AssertionError("no job is at work")
        threading.Event().wait(0.05)
    return rng.choice(sorted(at_work.items()))


def _pick_busy(world: World, rng: random.Random) -> tuple[Part, list[str]]:
    """A worker that has a job, and its job."""
    while True:
        _pick_at_work(world, rng)
        busy = [(worker, jobs) for worker in world.workers if (jobs := _jobs_of(world, worker))]
        if busy:
            return rng.choice(busy)


def _jobs_of(world: World, worker: Part) -> list[str]:
    return [job_id for job_id, pid in world.at_work().items() if _parent(pid) == worker.pid]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _attempts(world: World, job_ids: Iterable[str]) -> dict[str, int]:
    """Of jobs that run."""
    found = {}
    for job_id in job_ids:
        status, attempt = world.client.hmget(f"c2i:job:{job_id}", "status", "attempt")
        if status == b"running" and attempt:
            found[job_id] = int(attempt)
    return found


def _ended(world: World, job_id: str) -> bool:
    record = world.job(job_id)
    return record is None or record["status"] in TERMINAL


def _succeeded(world: World) -> str | None:
    return next((job.id for job in world.jobs if (world.job(job.id) or {}).get("status") == "succeeded"), None)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _freeze(part: Part, seconds: float) -> None:
    part.signal(signal.SIGSTOP)
    try:
        threading.Event().wait(seconds)
    finally:
        part.signal(signal.SIGCONT)


def _stop(part: Part) -> list[str]:
    part.signal(signal.SIGTERM)
    try:
        code = part.wait(GRACE_SECONDS + 20)
    except Exception:
        part.kill()
        return [f"{part.name} does not stop on SIGTERM"]
    # A process that is still starting dies of the signal and has nothing to hand back.
    return [] if code in (0, -signal.SIGTERM) else [f"{part.name} stopped with code {code}"]


def _factors(world: World) -> list[Path]:
    return sorted((world.data / "cache" / "spectra").glob("[!.]*"))


def _at_once(act: Callable[..., str | None], arguments: list[tuple[Any, ...]]) -> list[str]:
    with ThreadPoolExecutor(max(1, len(arguments))) as pool:
        return [told for told in pool.map(lambda given: act(*given), arguments) if told]


def _download_some(port: int, path: str, size: int, *, reset: bool) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = 0
        while received < size and (piece := client.recv(4096)):
            received += len(piece)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _open_blobs(world: World) -> list[str]:
    found = []
    for descriptor in Path(f"/proc/{world.api.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = descriptor.readlink()
            if "blobs" in target.parts:
                found.append(target.name)
    return found


def _listed(world: World) -> set[str]:
    found: set[str] = set()
    after: str | None = None
    while True:
        page = world.request("GET", "/v1/jobs", params={"limit": 100} | ({"after": after} if after else {})).json()
        found |= {job["id"] for job in page["data"]}
        after = page["next"]
        if after is None:
            return found

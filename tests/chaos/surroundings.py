"""Blows from outside: a full disk, an altered cache, clients that go away, cancel, delete and try again."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.chaos.blow import WORK_SECONDS, Blow, Impossible, attempts, succeeded
from tests.chaos.world import MODEL, Accepted, World
from tests.live import spec, wait_until

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
    finished = wait_until(lambda: succeeded(world), WORK_SECONDS, "a job has succeeded")
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
    blow = Blow(time.time(), attempts(world, world.at_work()))
    blow.problems += _at_once(cancel, moments)
    return blow


def delete_jobs(world: World, rng: random.Random) -> Blow:
    """Jobs are cancelled, and deleted as soon as that is allowed, by two clients at once; a third one still reads."""
    finished = wait_until(lambda: succeeded(world), WORK_SECONDS, "a job has succeeded")
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

    blow = Blow(time.time(), attempts(world, world.at_work()))
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


# --- how ---------------------------------------------------------------------------------------------------------


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

"""What a blow is, and whom it may be dealt to."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.world import TERMINAL, Part, World

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


def pick_at_work(world: World, rng: random.Random) -> tuple[str, int]:
    """A job that a process works on, and its pid; a new one where all have ended."""
    deadline = time.monotonic() + WORK_SECONDS
    while not (at_work := world.at_work()):
        if all(ended(world, job.id) for job in world.jobs):
            world.submit(rng)
        if time.monotonic() > deadline:
            raise AssertionError("no job is at work")
        threading.Event().wait(0.05)
    return rng.choice(sorted(at_work.items()))


def pick_busy(world: World, rng: random.Random) -> tuple[Part, list[str]]:
    """A worker that has a job, and its job."""
    while True:
        pick_at_work(world, rng)
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


def attempts(world: World, job_ids: Iterable[str]) -> dict[str, int]:
    """Of jobs that run."""
    found = {}
    for job_id in job_ids:
        status, attempt = world.client.hmget(f"c2i:job:{job_id}", "status", "attempt")
        if status == b"running" and attempt:
            found[job_id] = int(attempt)
    return found


def ended(world: World, job_id: str) -> bool:
    record = world.job(job_id)
    return record is None or record["status"] in TERMINAL


def succeeded(world: World) -> str | None:
    return next((job.id for job in world.jobs if (world.job(job.id) or {}).get("status") == "succeeded"), None)

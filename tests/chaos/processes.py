"""Blows to processes: killed, told to stop, frozen. What was killed is started again, as a supervisor does."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Collection

from service.queue import LEASE_SECONDS
from tests.chaos.blow import Blow, attempts, ended, pick_at_work, pick_busy
from tests.chaos.world import GRACE_SECONDS, Part, World

# --- processes killed --------------------------------------------------------------------------------------------


def kill_child(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a job's process."""
    job_id, pid = pick_at_work(world, rng)
    blow = _blow(world, [job_id])
    _kill(pid)
    return blow


def kill_child_thrice(world: World, rng: random.Random) -> Blow:
    """SIGKILL of one job's process in each of its attempts: it fails and says why."""
    job_id, _ = pick_at_work(world, rng)
    job = next(job for job in world.jobs if job.id == job_id)
    job.may_fail.add("worker_died")
    killed: set[int] = set()
    blow = Blow(time.time())
    while len(killed) < 3 and not ended(world, job_id):
        pid = world.at_work().get(job_id)
        if pid is None or pid in killed:
            threading.Event().wait(0.05)
            continue
        threading.Event().wait(rng.uniform(0, 1))
        blow = Blow(time.time(), attempts(world, [job_id]))
        _kill(pid)
        killed.add(pid)
    return blow


def kill_worker(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a worker that has a job."""
    worker, jobs = pick_busy(world, rng)
    blow = _blow(world, jobs)
    worker.kill()
    world.revive()
    return blow


def kill_api(world: World, _: random.Random) -> Blow:
    """SIGKILL of the API; the jobs go on."""
    blow = Blow(time.time(), spared=attempts(world, world.at_work()))
    world.api.kill()
    world.revive()
    return blow


def kill_redis(world: World, _: random.Random) -> Blow:
    """SIGKILL of Redis, which comes back with its append-only file; the jobs go on."""
    blow = Blow(time.time(), spared=attempts(world, world.at_work()))
    world.redis.kill()
    world.revive()
    return blow


def kill_worker_and_redis(world: World, rng: random.Random) -> Blow:
    """SIGKILL of a worker that has a job, and of Redis at the same moment."""
    worker, jobs = pick_busy(world, rng)
    blow = _blow(world, jobs)
    for part in rng.sample([worker, world.redis], 2):
        part.kill()
    world.revive()
    return blow


def power_cut(world: World, _: random.Random) -> Blow:
    """SIGKILL of everything at once."""
    blow = Blow(time.time(), attempts(world, world.at_work()))
    for part in world.parts:
        part.signal(signal.SIGKILL)
    for part in world.parts:
        part.wait(30)
    world.revive()
    return blow


# --- processes told to stop --------------------------------------------------------------------------------------


def stop_worker(world: World, rng: random.Random) -> Blow:
    """SIGTERM of a worker that has a job, which it finishes or hands back."""
    worker, jobs = pick_busy(world, rng)
    blow = _blow(world, jobs)
    blow.problems += _stop(worker)
    world.revive()
    return blow


def stop_everything(world: World, rng: random.Random) -> Blow:
    """SIGTERM of API and workers in any order, then of Redis."""
    blow = Blow(time.time(), attempts(world, world.at_work()))
    parts = rng.sample([world.api, *world.workers], 3)
    for part in parts:
        part.signal(signal.SIGTERM)
    for part in [*parts, world.redis]:
        blow.problems += _stop(part)
    # Who stops a service starts it again in his own time: recovery is counted from there.
    blow.at = time.time()
    world.revive()
    return blow


# --- processes and Redis that stand still ------------------------------------------------------------------------


def freeze_worker(world: World, rng: random.Random) -> Blow:
    """SIGSTOP of a worker for longer than its lease: another one takes its job, and it must not."""
    worker, jobs = pick_busy(world, rng)
    blow = _blow(world, jobs)
    _freeze(worker, LEASE_SECONDS + rng.uniform(4, 12))
    return blow


def freeze_worker_briefly(world: World, rng: random.Random) -> Blow:
    """SIGSTOP of a worker for less than its lease: its job goes on."""
    worker, _ = pick_busy(world, rng)
    blow = Blow(time.time(), spared=attempts(world, world.at_work()))
    _freeze(worker, rng.uniform(2, LEASE_SECONDS / 2))
    return blow


def silence_redis(world: World, _: random.Random) -> Blow:
    """A Redis that takes connections and commands and answers nothing for ten seconds; the jobs go on."""
    spared = attempts(world, world.at_work())
    _freeze(world.redis, 10)
    return Blow(time.time(), spared=spared)


def lose_redis(world: World, rng: random.Random) -> Blow:
    """No Redis for longer than any lease: no job outlives its lease, and all run again."""
    hit = attempts(world, world.at_work())
    world.redis.kill()
    threading.Event().wait(LEASE_SECONDS + rng.uniform(1, 8))
    world.revive()
    return Blow(time.time(), hit)


# --- how ---------------------------------------------------------------------------------------------------------


def _blow(world: World, hit: Collection[str]) -> Blow:
    """To the processes of some jobs; the others at work go on."""
    return Blow(time.time(), attempts(world, hit), attempts(world, world.at_work().keys() - set(hit)))


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

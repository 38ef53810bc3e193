"""Who works: every worker announces itself in Redis for as long as it lives.

    c2i:worker:ID      what it is and does, as JSON; lapses a few heartbeats after the last
    c2i:workers        sorted set of their IDs by the time at which they lapse; lapses with the last of them

This is for those who look on. Which worker holds a job is told by the job's lease alone (`service.queue`).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from enum import StrEnum
from typing import cast

from pydantic import BaseModel, ConfigDict
from redis import Redis

# An idle worker announces itself every five seconds, one at work every two.
LAPSE_SECONDS = 20
_INDEX = "c2i:workers"


class WorkerState(StrEnum):
    """What a worker does."""

    IDLE = "idle"
    """It waits for a job."""
    BUSY = "busy"
    """It has one."""
    STOPPING = "stopping"
    """It was told to stop, finishes the job it has and takes no other."""


class WorkerInfo(BaseModel):
    """A worker as it announced itself last."""

    model_config = ConfigDict(frozen=True)

    id: str
    host: str
    pid: int
    version: str
    """Of this software."""
    device: str
    """`cpu`, or the name of the GPU."""
    threads: int
    """Threads of one tensor operation on the processor."""
    speed: float | None
    """GFLOP/s of a float32 matrix product on the device, measured at the start; None where it was not."""
    state: WorkerState = WorkerState.IDLE
    job_id: str | None = None
    attempt: int | None = None
    started_at: datetime
    seen_at: datetime


def heartbeat(redis: Redis, info: WorkerInfo) -> None:
    """Announce a worker, for the next `LAPSE_SECONDS`."""
    now = time.time()
    seen = info.model_copy(update={"seen_at": datetime.fromtimestamp(now, UTC)})
    with redis.pipeline() as pipe:
        pipe.set(_key(info.id), seen.model_dump_json(), ex=LAPSE_SECONDS)
        pipe.zremrangebyscore(_INDEX, "-inf", now)
        pipe.zadd(_INDEX, {info.id: now + LAPSE_SECONDS})
        pipe.expire(_INDEX, LAPSE_SECONDS)
        pipe.execute()


def leave(redis: Redis, worker_id: str) -> None:
    """A worker ends."""
    with redis.pipeline() as pipe:
        pipe.delete(_key(worker_id))
        pipe.zrem(_INDEX, worker_id)
        pipe.execute()


def list_workers(redis: Redis) -> list[WorkerInfo]:
    """The workers that live, by their time of start. One that was killed is listed until its announcement lapses."""
    ids = [worker_id.decode() for worker_id in cast(list[bytes], redis.zrange(_INDEX, 0, -1))]
    announced = cast(list[bytes | None], redis.mget([_key(worker_id) for worker_id in ids])) if ids else []
    workers = [WorkerInfo.model_validate_json(text) for text in announced if text]
    return sorted(workers, key=lambda info: (info.started_at, info.id))


def _key(worker_id: str) -> str:
    return f"c2i:worker:{worker_id}"

"""Counts that outlive every process: what happened to jobs, in one Redis hash, for `/metrics`.

    c2i:counters    hash: `name`, or `name|value` where it is counted by a label, to its total

They are added to within the transaction that they count, so that they are neither lost nor counted twice.
"""

from __future__ import annotations

from typing import cast

from redis import Redis

KEY = "c2i:counters"

JOBS_CREATED = "jobs_created"
JOBS_ENDED = "jobs_ended"
"""By status."""
JOBS_REAPED = "jobs_reaped"
ATTEMPTS = "attempts"
ATTEMPTS_LOST = "attempts_lost"
"""Of attempts whose process or worker died."""
WAIT_SECONDS = "queue_wait_seconds"
WAITS = "queue_waits"
STAGE_SECONDS = "stage_seconds"
"""By stage; and how often each was left."""
STAGES = "stages"
PUBLISHED_BYTES = "published_bytes"
WEBHOOKS_ENDED = "webhooks_ended"
"""By whether they were delivered or given up."""

TRIES_ENDED = "tries_ended"
"""By status."""


def add(redis: Redis, name: str, amount: float = 1, label: str = "") -> None:
    """Add to a count, in a pipeline's transaction."""
    redis.hincrbyfloat(KEY, field(name, label), amount)


def field(name: str, label: str = "") -> str:
    """Of the hash, for a script that adds to it."""
    return f"{name}|{label}" if label else name


def read(redis: Redis) -> dict[tuple[str, str], float]:
    """All totals by name and label, which is empty where there is none."""
    found = cast(dict[bytes, bytes], redis.hgetall(KEY))
    return {_name_and_label(key.decode()): float(total) for key, total in found.items()}


def _name_and_label(key: str) -> tuple[str, str]:
    name, _, label = key.partition("|")
    return name, label

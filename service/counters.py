"""Counts that outlive every process: what happened to jobs, in one Redis hash, for `/metrics`.

    c2i:counters    hash: `name` or `name|label=value` to its total

They are added to within the transaction that they count, so that they are neither lost nor counted twice.
"""

from __future__ import annotations

from typing import Any, cast

from redis import Redis

KEY = "c2i:counters"

JOBS_CREATED = "jobs_created"
JOBS_ENDED = "jobs_ended"
"""By status."""
ATTEMPTS = "attempts"
ATTEMPTS_LOST = "attempts_lost"
"""Of attempts whose process or worker died."""
WAIT_SECONDS = "queue_wait_seconds"
WAITS = "queue_waits"
STAGE_SECONDS = "stage_seconds"
"""By stage; and how often each was left."""
STAGES = "stages"
PUBLISHED_BYTES = "published_bytes"


def add(redis: Redis, name: str, amount: float = 1, **labels: str) -> None:
    """Add to a count, in a pipeline's transaction."""
    redis.hincrbyfloat(KEY, name + "".join(f"|{label}={value}" for label, value in labels.items()), amount)


def read(redis: Redis) -> dict[str, dict[tuple[str, ...], float]]:
    """All counts: name to the values of its labels to the total."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for field, value in cast(dict[bytes, Any], redis.hgetall(KEY)).items():
        name, *labels = field.decode().split("|")
        found.setdefault(name, {})[tuple(label.partition("=")[2] for label in labels)] = float(value)
    return found

"""Walks Redis: every key lapses, or belongs to a job that exists, or is one of the few that a service keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, cast

from redis import Redis

# Kept for as long as there is a service. rq's sets hold names of workers, which rq itself clears every ten minutes.
PERSISTENT = re.compile(r"c2i:(counters|keys|webhooks:secrets)|rq:(queues|workers|workers:c2i(-tries)?)")
OF_JOB = re.compile(r"c2i:job:(job_[0-9a-z]{20})(:events)?")
OF_DELIVERY = re.compile(r"rq:job:(job_[0-9a-z]{20}-\d+)")
TERMINAL = ("succeeded", "failed", "cancelled")
AT_WORK = ("running", "cancelling")


class Records:
    """What the jobs' records say."""

    def __init__(self, redis: Redis) -> None:
        self.status: dict[str, str] = {}
        self.deliveries: dict[str, str] = {}
        for key in cast(Iterable[bytes], redis.scan_iter("c2i:job:job_*")):
            if re.fullmatch(rb"c2i:job:job_[0-9a-z]{20}", key):
                status, deliveries = cast(list[bytes | None], redis.hmget(key, "status", "deliveries"))
                if status and deliveries:
                    job_id = key.decode().rpartition(":")[2]
                    self.status[job_id] = status.decode()
                    self.deliveries[job_id] = f"{job_id}-{deliveries.decode()}"

    def are(self, *statuses: str) -> set[str]:
        """Jobs of these states."""
        return {job_id for job_id, status in self.status.items() if status in statuses}

    def waiting(self) -> set[str]:
        """Deliveries that a worker may still get."""
        return {self.deliveries[job_id] for job_id in self.are("queued")}


def find_stray_keys(redis: Redis) -> list[str]:
    """What nobody will ever remove, or what says another thing than the records. For a quiet service."""
    records = Records(redis)
    jobs = set(records.status)
    # Name of an index to what its members are to be.
    indexes: dict[str, Callable[[], set[str]]] = {
        r"c2i:jobs": lambda: jobs,
        r"c2i:active": lambda: jobs - records.are(*TERMINAL),
        r"c2i:ended": lambda: records.are(*TERMINAL),
        r"c2i:deleted": set,
        r"c2i:waiting:.*": records.waiting,
        r"c2i:running:.*": lambda: records.are(*AT_WORK),
        r"c2i:webhooks:due": lambda: _lanes(redis),
        r"c2i:webhooks:due:.*": lambda: records.are(*TERMINAL),
        r"c2i:order": records.waiting,
        r"c2i:held:.*": records.waiting,
        r"rq:queue:c2i": records.waiting,
        r"rq:queue:c2i:intermediate": set,
        r"rq:queue:c2i-tries": lambda: _waiting_tries(redis),
        r"rq:queue:c2i-tries:intermediate": set,
    }
    found = []
    for raw in cast(Iterable[bytes], redis.scan_iter()):
        key = raw.decode()
        if redis.pttl(key) != -1 or PERSISTENT.fullmatch(key):
            continue
        expected = next((members for name, members in indexes.items() if re.fullmatch(name, key)), None)
        if expected is not None:
            found += [f"{key} names {member}" for member in sorted(_members(redis, key) - expected())]
        elif match := OF_JOB.fullmatch(key):
            found += [] if match[1] in jobs else [f"{key} has no job"]
        elif match := OF_DELIVERY.fullmatch(key):
            found += [] if match[1] in records.waiting() else [f"{key} is of no waiting job"]
        elif key == "c2i:order:clock":
            found += [] if redis.exists("c2i:order") else [f"{key} although nothing waits"]
        else:
            found.append(f"{key} has neither a TTL nor an owner")
    missing = {"c2i:jobs": jobs, "c2i:active": jobs - records.are(*TERMINAL), "c2i:ended": records.are(*TERMINAL)}
    for index, members in missing.items():
        found += [f"{index} lacks {member}" for member in sorted(members - _members(redis, index))]
    return found


def _waiting_tries(redis: Redis) -> set[str]:
    """Tries lapse, all of their keys but the list."""
    found = set[str]()
    for key in cast(Iterable[bytes], redis.scan_iter("c2i:try:*")):
        if b":lease:" not in key:
            status, deliveries = cast(list[bytes | None], redis.hmget(key, "status", "deliveries"))
            if status == b"queued" and deliveries:
                found.add(f"{key.decode().rpartition(':')[2]}-{deliveries.decode()}")
    return found


def _lanes(redis: Redis) -> set[str]:
    lanes = cast(Iterable[bytes], redis.scan_iter("c2i:webhooks:due:*"))
    return {key.decode().removeprefix("c2i:webhooks:due:") for key in lanes}


def _members(redis: Redis, key: str) -> set[str]:
    kind = cast(bytes, redis.type(key))
    read: dict[bytes, Callable[[], Any]] = {
        b"set": lambda: redis.smembers(key),
        b"zset": lambda: redis.zrange(key, 0, -1),
        b"list": lambda: redis.lrange(key, 0, -1),
    }
    return {member.decode() for member in read[kind]()} if kind in read else set()

"""Messages of jobs that have ended, until they are delivered or given up.

    c2i:webhooks:due              sorted set: lanes by when the next of their messages is due
    c2i:webhooks:due:LANE         sorted set: IDs of jobs by when their message is due

A message is written by the transaction that ends its job, so none is lost and none tells of what did not happen. Its
text is made from the job's record, which does not change any more; how far it is stands in the record too.

A lane is an owner's, or a host's where no API keys are in use. Lanes take turns, so one with a thousand messages to a
dead receiver holds up no other.

Times are milliseconds; those of leases are by the clock of Redis, which all senders share. Who takes a message moves it
to the end of its lease, and that number is the proof that it is still the one who has it: two senders never have a
message at once, and one that dies leaves it to be sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

from redis import Redis
from redis.client import Pipeline

from service import counters
from service.webhooks.contract import DeliveryStatus, Webhook, WebhookState

DUE = "c2i:webhooks:due"

Record = dict[str, str]

# What was taken goes to the end of its lease, and the lane to the end of those that wait now.
_CLAIM = """
local job = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[2], 'LIMIT', 0, 1)[1]
if job then
  redis.call('ZADD', KEYS[2], ARGV[3], job)
end
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')[2]
if not first then
  redis.call('ZREM', KEYS[1], ARGV[1])
elseif tonumber(first) < tonumber(ARGV[2]) then
  redis.call('ZADD', KEYS[1], ARGV[2], ARGV[1])
else
  redis.call('ZADD', KEYS[1], first, ARGV[1])
end
return job
"""

# A job that was deleted since has no lease here, so no record comes back.
_SETTLE = """
local lease = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not lease or tonumber(lease) ~= tonumber(ARGV[3]) then
  return 0
end
redis.call('HSET', KEYS[3], 'webhook_status', ARGV[5], 'webhook_attempts', ARGV[6], 'webhook_error', ARGV[7])
if ARGV[4] ~= '' then
  redis.call('ZADD', KEYS[2], ARGV[4], ARGV[2])
  redis.call('ZADD', KEYS[1], 'LT', ARGV[4], ARGV[1])
else
  redis.call('ZREM', KEYS[2], ARGV[2])
  if redis.call('EXISTS', KEYS[2]) == 0 then
    redis.call('ZREM', KEYS[1], ARGV[1])
  end
  redis.call('HINCRBYFLOAT', KEYS[4], ARGV[8], 1)
end
return 1
"""


def fields(webhook: Webhook, owner: str) -> Record:
    """What a job's record holds of its webhook."""
    return {
        "webhook_url": webhook.url,
        "webhook_lane": owner or webhook.target.host,
        "webhook_status": DeliveryStatus.PENDING.value,
    }


def state(record: Record) -> WebhookState | None:
    """What its client sees of it."""
    if "webhook_status" not in record:
        return None
    return WebhookState(
        status=DeliveryStatus(record["webhook_status"]),
        attempts=int(record.get("webhook_attempts", "0")),
        last_error=record.get("webhook_error") or None,
    )


def add(pipe: Pipeline, record: Record) -> None:
    """The job ends, as part of a transaction: its message is due."""
    if lane := record.get("webhook_lane"):
        now = _now()
        pipe.zadd(_lane_key(lane), {record["id"]: now})
        pipe.zadd(DUE, {lane: now}, lt=True)


def forget(pipe: Pipeline, record: Record) -> None:
    """The job is deleted, as part of a transaction: its message is not sent any more."""
    if lane := record.get("webhook_lane"):
        pipe.zrem(_lane_key(lane), record["id"])


@dataclass(frozen=True)
class Taken:
    """A message that this process has until its lease ends."""

    job_id: str
    lane: str
    lease: int


@dataclass(frozen=True)
class Letter:
    """Where a message goes, how often that was tried, and whose secret signs it."""

    url: str = field(repr=False)
    attempts: int
    owner: str


class Outbox:
    """The messages of one Redis.

    Args:
        record_key: a job's ID to the key of its record.
    """

    def __init__(self, redis: Redis, record_key: Callable[[str], str]) -> None:
        self._redis = redis
        self._record_key = record_key

    def take(self, lease: timedelta, busy: Mapping[str, int], most: int, most_of_lane: int) -> list[Taken]:
        """Messages that are due: one of each lane, which then waits behind the others.

        Args:
            busy: how many the caller has of each lane.
            most: how many it may have, and `most_of_lane` of each lane.
        """
        taken: list[Taken] = []
        room = most - sum(busy.values())
        seconds, microseconds = self._redis.time()
        now = seconds * 1000 + microseconds // 1000
        until = now + _milliseconds(lease)
        for lane in cast(list[bytes], self._redis.zrangebyscore(DUE, "-inf", now)):
            if len(taken) >= room:
                break
            name = lane.decode()
            if busy.get(name, 0) >= most_of_lane:
                continue
            job = cast(bytes | None, self._redis.eval(_CLAIM, 2, DUE, _lane_key(name), name, str(now), str(until)))
            if job is not None:
                taken.append(Taken(job.decode(), name, until))
        return taken

    def read(self, taken: Taken) -> Letter | None:
        """What a message needs beside its text; None where its job was deleted."""
        url, attempts, owner = cast(
            list[bytes | None],
            self._redis.hmget(self._record_key(taken.job_id), "webhook_url", "webhook_attempts", "owner"),
        )
        return Letter(url.decode(), int(attempts or 0), (owner or b"").decode()) if url is not None else None

    def settle(self, taken: Taken, state: WebhookState, again_in: timedelta | None = None) -> bool:
        """Write what became of an attempt; whether it was still the caller's to write.

        Args:
            again_in: when the next attempt is due; None where there is none.
        """
        due = "" if again_in is None else str(_now() + _milliseconds(again_in))
        return bool(
            self._redis.eval(
                _SETTLE,
                4,
                DUE,
                _lane_key(taken.lane),
                self._record_key(taken.job_id),
                counters.KEY,
                taken.lane,
                taken.job_id,
                str(taken.lease),
                due,
                state.status.value,
                str(state.attempts),
                state.last_error or "",
                counters.field(counters.WEBHOOKS_ENDED, state.status.value),
            )
        )

    def drop(self, taken: Taken) -> None:
        """Throw away a message whose job was deleted."""
        self._redis.zrem(_lane_key(taken.lane), taken.job_id)


def _lane_key(lane: str) -> str:
    return f"{DUE}:{lane}"


def _milliseconds(duration: timedelta) -> int:
    return int(duration.total_seconds() * 1000)


def _now() -> int:
    return time.time_ns() // 1_000_000

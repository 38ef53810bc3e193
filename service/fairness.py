"""Whose job is next: start-time fair queueing between API keys, in the order of rq's own list.

Each job gets a virtual start: the key's last one plus one, but not before that of the job which started last. The list
is kept in that order, so a key's first job stands next to the head however many another has waiting, and keys that
wait together take turns; within a key, first come, first served (Goyal, Vin and Cheng, Start-time Fair Queueing,
1996).

    c2i:order          sorted set: the waiting deliveries by virtual start
    c2i:order:clock    hash: `now`, the virtual start of the job that started last, and each key's next one;
                       both go when nothing waits
    c2i:held:OWNER     sorted set: deliveries of a key that has as many jobs running as it may

All changes are scripts within the transactions of `service.queue`: list and set change together with the record.
"""

from __future__ import annotations

from typing import Any, cast

from redis import Redis
from redis.client import Pipeline

ORDER = "c2i:order"
CLOCK = "c2i:order:clock"
HELD = "c2i:held:"

# rq has pushed the delivery to the list's end: it moves before the first one of a later start. A later one that is in
# the set and not in the list is on its way to a worker.
_PLACE = """
local now = tonumber(redis.call('HGET', KEYS[3], 'now') or '0')
local owner = 'owner:' .. ARGV[2]
local start = math.max(now, tonumber(redis.call('HGET', KEYS[3], owner) or '0'))
redis.call('HSET', KEYS[3], owner, start + 1)
redis.call('ZADD', KEYS[2], start, ARGV[1])
for _, later in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. start, '+inf', 'LIMIT', 0, 100)) do
  if redis.call('LINSERT', KEYS[1], 'BEFORE', later, ARGV[1]) > 0 then
    redis.call('LREM', KEYS[1], -1, ARGV[1])
    return
  end
end
"""

_FIRST = """
redis.call('ZADD', KEYS[1], tonumber(redis.call('HGET', KEYS[2], 'now') or '0') - 1, ARGV[1])
"""

_LEAVE = """
local start = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 'nan')
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[2])
elseif ARGV[2] == '1' and start and start > tonumber(redis.call('HGET', KEYS[2], 'now') or '0') then
  redis.call('HSET', KEYS[2], 'now', start)
end
"""

_HOLD = """
redis.call('ZADD', KEYS[2], tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or '0'), ARGV[1])
"""

_RELEASE = """
local delivery = redis.call('ZRANGE', KEYS[4], 0, 0)[1]
if delivery then
  redis.call('ZREM', KEYS[4], delivery)
  redis.call('LPUSH', KEYS[1], delivery)
  redis.call('ZADD', KEYS[2], tonumber(redis.call('HGET', KEYS[3], 'now') or '0') - 1, delivery)
end
"""


class Held(Exception):
    """To a worker: the job waits until another of its owner's ends."""


def place(pipe: Pipeline, waiting: str, delivery: str, owner: str) -> None:
    """Move a new delivery from the end of the list `waiting` to where it belongs."""
    _run(pipe, _PLACE, [waiting, ORDER, CLOCK], delivery, owner)


def place_first(pipe: Pipeline, delivery: str) -> None:
    """Note a delivery that was pushed to the head: a job that had begun before."""
    _run(pipe, _FIRST, [ORDER, CLOCK], delivery)


def leave(pipe: Pipeline, delivery: str, owner: str, *, started: bool) -> None:
    """A delivery starts, or is withdrawn."""
    _leave_order(pipe, delivery, started=started)
    pipe.zrem(HELD + owner, delivery)


def hold(pipe: Pipeline, delivery: str, owner: str) -> None:
    """A delivery waits, out of the list, until a job of its owner ends."""
    _run(pipe, _HOLD, [ORDER, HELD + owner], delivery)
    _leave_order(pipe, delivery, started=False)


def release(pipe: Pipeline, waiting: str, owner: str) -> None:
    """A job of the owner has ended: the first of those that are held is the next."""
    _run(pipe, _RELEASE, [waiting, ORDER, CLOCK, HELD + owner])


def is_held(redis: Redis, delivery: str, owner: str) -> bool:
    """Whether a delivery waits for another job of its owner to end."""
    return redis.zscore(HELD + owner, delivery) is not None


def held_before(redis: Redis, delivery: str, owner: str) -> int | None:
    """How many of the owner's are released before it; None where it is not held."""
    return cast(int | None, redis.zrank(HELD + owner, delivery))


def _leave_order(pipe: Pipeline, delivery: str, *, started: bool) -> None:
    _run(pipe, _LEAVE, [ORDER, CLOCK], delivery, "1" if started else "0")


def _run(pipe: Pipeline, script: str, keys: list[str], *arguments: Any) -> None:
    pipe.eval(script, len(keys), *keys, *arguments)

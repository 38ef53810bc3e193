"""Whose job is next: start-time fair queueing between API keys, in the order of rq's own list.

Each job gets a virtual start: one later than its key's job before it, but not before that of the job which started
last. The list is kept in that order, so a key's first job stands next to the head however many another has waiting,
and keys that wait together take turns; within a key, first come, first served (Goyal, Vin and Cheng, Start-time Fair
Queueing, 1996).

A key that has as many jobs running as it may is out of the order: its jobs are held, and as one of them ends the first
held job comes back with the virtual start of a job that arrives then. A key gathers no claims while it is held.

    c2i:order                sorted set: the waiting deliveries that are not held, by virtual start
    c2i:order:clock          hash: `now`, the virtual start of the job that started last, and for each key one more
                             than that of its own; both keys go when nothing waits
    c2i:waiting:OWNER        sorted set: all waiting deliveries of a key, by their place among these
    c2i:held:OWNER           sorted set: those that are held, by the same

All changes are scripts within the transactions of `service.queue`: list and sets change together with the record.
"""

from __future__ import annotations

from typing import Any, cast

from redis import Redis
from redis.client import Pipeline

ORDER = "c2i:order"
CLOCK = "c2i:order:clock"

# KEYS of each script: the list, ORDER, CLOCK, and the owner's two sets. ARGV: the delivery, the owner.
# One that is in the order and not in the list is on its way to a worker.
_COMMON = """
local list, order, clock, waiting, held = unpack(KEYS)
local delivery, owner = ARGV[1], 'owner:' .. (ARGV[2] or '')
local function read(field) return tonumber(redis.call('HGET', clock, field) or '0') end
local function insert(one, start)
  redis.call('ZADD', order, start, one)
  for _, later in ipairs(redis.call('ZRANGEBYSCORE', order, '(' .. start, '+inf', 'LIMIT', 0, 100)) do
    if redis.call('LINSERT', list, 'BEFORE', later, one) > 0 then return end
  end
  redis.call('RPUSH', list, one)
end
local function stop_clock()
  if redis.call('EXISTS', order) == 0 then redis.call('DEL', clock) end
end
"""

# rq has pushed the delivery to the list's end.
_PLACE = """
redis.call('LREM', list, -1, delivery)
local last = redis.call('ZREVRANGE', waiting, 0, 0, 'WITHSCORES')[2]
local start = math.max(read('now'), read(owner), tonumber(last or '-1') + 1)
redis.call('ZADD', waiting, start, delivery)
insert(delivery, start)
"""

# rq has pushed the delivery to the list's head; it is older than all that its owner has waiting.
_PLACE_FIRST = """
redis.call('ZADD', waiting, -1, delivery)
redis.call('ZADD', order, read('now') - 1, delivery)
"""

_LEAVE = """
local start = redis.call('ZSCORE', order, delivery)
redis.call('ZREM', waiting, delivery)
redis.call('ZREM', held, delivery)
redis.call('ZREM', order, delivery)
if start and ARGV[3] == '1' then
  redis.call('HSET', clock, 'now', math.max(read('now'), start), owner, math.max(read(owner), start + 1))
end
stop_clock()
"""

# All at once: a worker that looks for a job it may start does not take a key's thousand one by one.
_HOLD = """
local function hold(one)
  redis.call('ZADD', held, redis.call('ZSCORE', waiting, one) or '0', one)
  redis.call('ZREM', order, one)
end
local others = {}
local entries = redis.call('LRANGE', list, 0, -1)
for _, one in ipairs(entries) do
  if redis.call('ZSCORE', waiting, one) then hold(one) else table.insert(others, one) end
end
if #others < #entries then
  redis.call('DEL', list)
  for at = 1, #others, 1000 do
    redis.call('RPUSH', list, unpack(others, at, math.min(at + 999, #others)))
  end
end
hold(delivery)
stop_clock()
"""

# Before what has arrived since of the same owner.
_RELEASE = """
local oldest = redis.call('ZRANGE', held, 0, 0, 'WITHSCORES')
if not oldest[1] then return end
redis.call('ZREM', held, oldest[1])
local start = math.max(read('now'), read(owner))
for _, one in ipairs(redis.call('ZRANGEBYSCORE', order, '-inf', start, 'LIMIT', 0, 1000)) do
  local place = redis.call('ZSCORE', waiting, one)
  if place and tonumber(place) > tonumber(oldest[2]) and redis.call('LINSERT', list, 'BEFORE', one, oldest[1]) > 0 then
    redis.call('ZADD', order, redis.call('ZSCORE', order, one), oldest[1])
    return
  end
end
insert(oldest[1], start)
"""


class Held(Exception):
    """To a worker: the job waits until another of its owner's ends."""


def place(pipe: Pipeline, waiting: str, delivery: str, owner: str) -> None:
    """Move a new delivery from the end of the list `waiting` to where it belongs."""
    _run(pipe, _PLACE, waiting, owner, delivery)


def place_first(pipe: Pipeline, waiting: str, delivery: str, owner: str) -> None:
    """Note a delivery that was pushed to the head: a job that had begun before."""
    _run(pipe, _PLACE_FIRST, waiting, owner, delivery)


def leave(pipe: Pipeline, waiting: str, delivery: str, owner: str, *, started: bool) -> None:
    """A delivery starts, or is withdrawn."""
    _run(pipe, _LEAVE, waiting, owner, delivery, "1" if started else "0")


def hold(pipe: Pipeline, waiting: str, delivery: str, owner: str) -> None:
    """A delivery that was to start waits, and so do all of its owner's, out of the list until a job of theirs ends."""
    _run(pipe, _HOLD, waiting, owner, delivery)


def release(pipe: Pipeline, waiting: str, owner: str) -> None:
    """A job of the owner has ended: the oldest of those that are held takes its turn among the waiting."""
    _run(pipe, _RELEASE, waiting, owner, "")


def waiting_key(owner: str) -> str:
    """The sorted set of an owner's waiting deliveries."""
    return f"c2i:waiting:{owner}"


def held_key(owner: str) -> str:
    """The sorted set of those that are held."""
    return f"c2i:held:{owner}"


def held_before(redis: Redis, delivery: str, owner: str) -> int:
    """How many older ones of the same owner are held."""
    place = redis.zscore(waiting_key(owner), delivery)
    return 0 if place is None else redis.zcount(held_key(owner), "-inf", f"({place}")


def list_before(redis: Redis, owner: str, held: int) -> int:
    """How many that are not held start before the one that has `held` before it."""
    now, own = cast(list[bytes | None], redis.hmget(CLOCK, "now", f"owner:{owner}"))
    return redis.zcount(ORDER, "-inf", max(float(now or 0), float(own or 0)) + held)


def _run(pipe: Pipeline, script: str, waiting: str, owner: str, delivery: str, *arguments: Any) -> None:
    keys = [waiting, ORDER, CLOCK, waiting_key(owner), held_key(owner)]
    pipe.eval(_COMMON + script, len(keys), *keys, delivery, owner, *arguments)

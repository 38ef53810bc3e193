"""Keys of tries, and what a job that is deleted does with them.

    c2i:try:ID                  hash: the record, with the prompt until it is answered
    c2i:try:ID:lease:ATTEMPT    a worker has it, as for a job
    c2i:tries                   set of OWNER|ID, those that have not ended
    c2i:job:ID:tries            set of the IDs of a job's tries, which are deleted with it

Unlike a job a try is kept for an hour and no longer: all of its keys lapse by themselves.
"""

from __future__ import annotations

from redis.client import Pipeline

QUEUE = "c2i-tries"
UNENDED = "c2i:tries"

# KEYS: the set of the job's tries, the queue's list. ARGV: the job's owner.
_FORGET = """
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local key = 'c2i:try:' .. id
  local number, owner = unpack(redis.call('HMGET', key, 'deliveries', 'owner'))
  if number then
    redis.call('LREM', KEYS[2], 0, id .. '-' .. number)
    redis.call('DEL', 'rq:job:' .. id .. '-' .. number)
    redis.call('SREM', 'c2i:tries', owner .. '|' .. id)
  end
  redis.call('DEL', key)
  redis.call('PUBLISH', 'c2i:changes', id)
end
redis.call('DEL', KEYS[1])
"""


def try_key(try_id: str) -> str:
    """The hash of a try's record."""
    return f"c2i:try:{try_id}"


def lease_key(try_id: str, attempt: int) -> str:
    """What a worker renews for as long as it has the attempt."""
    return f"c2i:try:{try_id}:lease:{attempt}"


def tries_key(job_id: str) -> str:
    """The set of a job's tries."""
    return f"c2i:job:{job_id}:tries"


def forget(pipe: Pipeline, job_id: str) -> None:
    """Delete the tries of a job, in the transaction that deletes it. Who waits for one is woken, its process killed."""
    pipe.eval(_FORGET, 2, tries_key(job_id), f"rq:queue:{QUEUE}")

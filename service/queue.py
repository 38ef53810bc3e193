"""Jobs in Redis: the one module that knows its keys.

    c2i:jobs                      sorted set of all job IDs, which sort by time of creation
    c2i:jobs:owned                sorted set of OWNER:ID, those of jobs that were submitted with an API key
    c2i:active                    set of the IDs that are not terminal
    c2i:ended                     sorted set of those that are, by the time at which they ended
    c2i:deleted                   set of the IDs of deleted jobs whose files may still be there
    c2i:running:OWNER             set of the IDs of an owner's jobs that a worker has
    c2i:job:ID                    hash: the record
    c2i:job:ID:events             stream: what happened to it
    c2i:changes                   channel: the ID of a job that has changed
    c2i:probe                     written by whoever asks whether Redis can be
    c2i:job:ID:lease:ATTEMPT      a worker has it; it renews this, and the key lapses with the worker

rq is transport alone: a job's ID, as JSON, in its queue. Each delivery to a worker has an ID of its own,
`JOB-N`, so that a second delivery never touches what rq keeps of the first. Every change of a record is one
transaction that watches the record, so a change either saw the newest state or is made again.

A worker's writes carry the attempt they belong to and are refused once another attempt has begun.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, cast
from urllib.parse import quote

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

from service import counters, fairness, idempotency
from service.errors import C2IError, Conflict, InvalidInput, JobNotFound, Unavailable, WorkerDied
from service.idempotency import Claim
from service.jobs import Job, JobError, JobEvent, JobResult, JobSpec, JobStatus, Progress
from service.limits import QueueLimits
from service.webhooks import outbox

QUEUE = "c2i"
# Where the ID of a job is published at each of its events.
CHANGES = "c2i:changes"
JOB_ID = re.compile(r"job_[0-9a-z]{20}")
# A worker renews its lease every two seconds. A Redis that is away for less than this costs no running job, and a job
# whose worker is gone waits no longer.
LEASE_SECONDS = 18
# A job whose process was killed is tried three times in all.
MAX_CRASHES = 3
MAX_EVENTS = 1_000
# Of this many records something is asked in one trip.
BATCH = 500
OLDEST_REDIS = (6, 2)
OWNED = "c2i:jobs:owned"
ENDED = "c2i:ended"
DELETED = "c2i:deleted"
# Jobs that expire at one look of the reaper.
EXPIRE_BATCH = 200
# Index entries whose records are looked for in one round trip.
PRUNE_BATCH = 500
# So near to its limit, an owner's submissions are counted one after the other.
NEAR_LIMIT = 64

Record = dict[str, str]
Change = Callable[[Record, Pipeline], None]


def connect(url: str, *, patient: bool = True) -> Redis:
    """A client that waits out a restart of Redis, up to three seconds of it; an impatient one says within two that
    there is none.

    Raises:
        InvalidInput: what is no Redis URL.
    """
    tries = 8 if patient else 0
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), tries, supported_errors=(RedisConnectionError,))
    connecting, answering = (5, 10) if patient else (2, 2)
    try:
        return Redis.from_url(url, socket_connect_timeout=connecting, socket_timeout=answering, retry=retry)
    except ValueError:
        raise InvalidInput("a Redis URL begins with redis://, rediss:// or unix://", param="REDIS_URL") from None


def check_redis(redis: Redis) -> None:
    """Raises Unavailable where Redis does not answer, is too old, or refuses to write."""
    try:
        version = str(redis.info("server")["redis_version"])
        redis.set("c2i:probe", "", ex=60)
    except ResponseError:
        raise Unavailable(
            "Redis refuses to write; its log says why: a full disk, no memory, or it is a replica"
        ) from None
    except RedisError:
        raise Unavailable("Redis does not answer; check that it runs and that REDIS_URL leads to it") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        raise Unavailable(f"Redis {version} is too old; 6.2 or newer is needed")


def socket_url(path: str) -> str:
    """The URL of a Redis that listens on a unix socket."""
    return f"unix://{quote(path)}"


def new_job_id() -> str:
    """Random, and sorted by the time it was made: ten digits of milliseconds in base 32, ten random ones."""
    return "job_" + _base32(time.time_ns() // 1_000_000) + _base32(secrets.randbits(50))


def _base32(number: int) -> str:
    return "".join("0123456789abcdefghjkmnpqrstvwxyz"[number >> shift & 31] for shift in range(45, -5, -5))


@dataclass(frozen=True)
class Census:
    """What `/metrics` shows of the queue."""

    by_status: Mapping[JobStatus, int]
    """Of jobs that have not ended."""
    kept: int
    """Records, those of ended jobs included."""
    depth: int
    oldest: float | None
    """When the job that waits longest was queued, in seconds of the epoch."""


class JobQueue:
    """Records, events and deliveries of all jobs."""

    def __init__(self, redis: Redis, ttl: timedelta, limits: QueueLimits | None = None) -> None:
        self.redis = redis
        self.limits = limits or QueueLimits()
        self.deliveries = Queue(QUEUE, connection=redis, serializer=JSONSerializer, default_timeout=-1)
        self.outbox = outbox.Outbox(redis, _job_key)
        self._ttl = ttl

    def check(self) -> None:
        """Raises Unavailable where Redis does not answer or is too old."""
        check_redis(self.redis)

    # --- what clients do: an `owner` sees its own jobs alone, None sees all ---------------------------------------

    def create(self, job_id: str, spec: JobSpec, owner: str = "", claim: Claim | None = None) -> Job:
        """Store the record and queue the job, both or neither. Its input must be stored already.

        Args:
            owner: the ID of the key that submits it; empty where no keys are in use.
            claim: where it is another job's already, that job is returned and none is created.

        Raises:
            Conflict: the claim was made with another body, or for a job that is gone.
            TooManyRequests: the owner has as many jobs waiting as it may.
        """
        record = {
            "id": job_id,
            "owner": owner,
            "status": JobStatus.QUEUED.value,
            "model": spec.model,
            "strategy": spec.strategy.value,
            "created_at": _now(),
            "queued_at": repr(time.time()),
            "attempt": "0",
            "crashes": "0",
            "deliveries": "0",
            "progress": Progress().model_dump_json(),
            "metadata": json.dumps(spec.metadata),
        } | (outbox.fields(spec.webhook, owner) if spec.webhook else {})
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(_job_key(job_id), *([claim.name] if claim else []))
                    if pipe.exists(_job_key(job_id)):
                        break  # by a try whose answer was lost
                    if claim and (holder := claim.holder(pipe)):
                        return self._claimed(holder)
                    self._check_waiting(pipe, owner)
                    pipe.multi()
                    if claim:
                        claim.hold(pipe, job_id)
                    pipe.hset(_job_key(job_id), mapping=cast(Any, record))
                    pipe.zadd("c2i:jobs", {job_id: 0})
                    if owner:
                        pipe.zadd(OWNED, {f"{owner}:{job_id}": 0})
                    pipe.sadd("c2i:active", job_id)
                    self._deliver(record, pipe)
                    counters.add(pipe, counters.JOBS_CREATED)
                    self._add_event(record, pipe, "status", "queued")
                    pipe.execute()
                except WatchError:
                    continue
                break
        return self.get(job_id)

    def find_claimed(self, claim: Claim) -> Job | None:
        """The job that an earlier request with this claim created.

        Raises:
            Conflict: as for `create`.
        """
        holder = claim.holder(self.redis)
        return self._claimed(holder) if holder else None

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """The job as clients see it.

        Raises:
            JobNotFound: there is none, it has expired, or it belongs to another.
        """
        record = self._record(job_id, owner)
        if record["status"] == JobStatus.QUEUED:
            return _job(record, queue_position=self._position(record))
        return _job(record)

    def status(self, job_id: str, owner: str | None = None) -> JobStatus:
        """The status alone, cheaply."""
        status, theirs = cast(list[bytes | None], self.redis.hmget(_job_key(job_id), "status", "owner"))
        if status is None or owner not in (None, (theirs or b"").decode()):
            raise _not_found(job_id)
        return JobStatus(status.decode())

    def list_jobs(self, limit: int, after: str | None = None, owner: str | None = None) -> list[Job]:
        """Jobs from the newest to the oldest, at most `limit`, older than the job `after`."""
        found: list[Job] = []
        index, prefix = ("c2i:jobs", "") if owner is None else (OWNED, f"{owner}:")
        # "~" sorts behind whatever an ID is made of.
        newest = f"({prefix}{after or '~'}"
        while len(found) < limit:
            entries = cast(list[bytes], self.redis.zrevrangebylex(index, newest, f"[{prefix}", 0, limit - len(found)))
            if not entries:
                break
            newest = f"({entries[-1].decode()}"
            for entry in entries:
                try:
                    found.append(self.get(entry.decode().removeprefix(prefix), owner))
                except JobNotFound:
                    self.redis.zrem(index, entry)  # expired
        return found

    def events(self, job_id: str, after: str | None = None, owner: str | None = None) -> list[JobEvent]:
        """What happened to the job, oldest first, later than the event `after`."""
        return self.history(job_id, after, owner)[1]

    def history(
        self, job_id: str, after: str | None = None, owner: str | None = None
    ) -> tuple[JobStatus, list[JobEvent]]:
        """The events, and the status before they were read: where it is terminal, none comes after them."""
        status = self.status(job_id, owner)
        entries = cast(
            list[tuple[bytes, dict[bytes, bytes]]],
            self.redis.xrange(_events_key(job_id), f"({after}" if after else "-", "+"),
        )
        events = [
            JobEvent.model_validate({**json.loads(fields[b"event"]), "id": event_id.decode()})
            for event_id, fields in entries
        ]
        return status, events

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Stop a job: at once where it is queued, else by asking its worker. Twice is as good as once.

        Raises:
            Conflict: it has ended otherwise.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            if record["status"] == JobStatus.QUEUED:
                self._withdraw(record, pipe)
                self._end(record, pipe, JobStatus.CANCELLED, "cancelled before it began")
            elif record["status"] == JobStatus.RUNNING:
                self._set(record, pipe, status=JobStatus.CANCELLING.value)
                self._add_event(record, pipe, "status", "cancelling")
            elif record["status"] in (JobStatus.SUCCEEDED, JobStatus.FAILED):
                raise Conflict(f"the job has {record['status']} already; there is nothing to cancel")

        self._change(job_id, change, owner)
        return self.get(job_id)

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """Forget a terminal job.

        Raises:
            Conflict: it still runs or waits.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            if not JobStatus(record["status"]).terminal:
                raise Conflict(
                    f"the job is {record['status']}; cancel it first (POST /v1/jobs/{job_id}/cancel), then delete it"
                )
            pipe.delete(_job_key(job_id), _events_key(job_id))
            pipe.zrem("c2i:jobs", job_id)
            pipe.zrem(OWNED, f"{record.get('owner', '')}:{job_id}")
            pipe.zrem(ENDED, job_id)
            pipe.sadd(DELETED, job_id)
            outbox.forget(pipe, record)

        self._change(job_id, change, owner)

    def files_deleted(self, job_id: str) -> None:
        """The files of a deleted job are gone."""
        self.redis.srem(DELETED, job_id)

    # --- what workers do -----------------------------------------------------------------------------------------

    def start(self, job_id: str) -> int:
        """Take a queued job; the number of the attempt that begins, with its lease.

        Raises:
            Conflict: it was cancelled, or another worker has it.
            fairness.Held: its owner has as many jobs running as it may; it waits for one of them to end.
        """
        attempt = running = 0

        def look(record: Record, pipe: Pipeline) -> None:
            nonlocal running
            key = _running_key(record.get("owner", ""))
            pipe.watch(key)
            running = int(pipe.scard(key))

        def change(record: Record, pipe: Pipeline) -> None:
            nonlocal attempt
            if record["status"] != JobStatus.QUEUED:
                raise Conflict(f"the job is {record['status']}, not queued")
            if self.limits.running is not None and running >= self.limits.running:
                pipe.lrem(self.deliveries.intermediate_queue_key, 0, _delivery_id(record))
                fairness.hold(pipe, self.deliveries.key, _delivery_id(record), record.get("owner", ""))
                attempt = 0
                return
            self._withdraw(record, pipe, started=True)
            if self.limits.running is not None and running + 1 < self.limits.running:
                fairness.release(pipe, self.deliveries.key, record.get("owner", ""))  # held under a lower limit
            attempt = int(record["attempt"]) + 1
            progress = Progress().model_dump_json()
            status = JobStatus.RUNNING.value
            self._set(record, pipe, status=status, attempt=str(attempt), started_at=_now(), progress=progress)
            pipe.set(_lease_key(job_id, attempt), "", ex=LEASE_SECONDS)
            counters.add(pipe, counters.ATTEMPTS)
            counters.add(pipe, counters.WAITS)
            counters.add(pipe, counters.WAIT_SECONDS, _since(record, "queued_at"))
            self._add_event(record, pipe, "status", f"attempt {attempt} began")

        self._change(job_id, change, look=look if self.limits.running is not None else None)
        if not attempt:
            raise fairness.Held("its owner has as many jobs running as it may")
        return attempt

    def drop(self, delivery: str) -> None:
        """Throw away a delivery of a job that is not to be started."""
        self.redis.lrem(self.deliveries.intermediate_queue_key, 0, delivery)
        self.redis.delete(f"rq:job:{delivery}")

    def renew_lease(self, job_id: str, attempt: int) -> None:
        """Say that the attempt's worker lives."""
        self.redis.set(_lease_key(job_id, attempt), "", ex=LEASE_SECONDS)

    def attempt_status(self, job_id: str, attempt: int) -> JobStatus | None:
        """The job's status, None where the attempt is not the current one."""
        status, current = cast(list[bytes | None], self.redis.hmget(_job_key(job_id), "status", "attempt"))
        return JobStatus(status.decode()) if status and current and int(current) == attempt else None

    def progress(self, job_id: str, attempt: int, progress: Progress, message: str) -> None:
        """Record where the attempt is.

        Raises:
            Conflict: it is to stop.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            _check_attempt(record, attempt, JobStatus.RUNNING)
            if progress.stage and progress.stage != record.get("stage"):
                self._leave_stage(record, pipe)
                self._set(record, pipe, stage=progress.stage.value, stage_at=repr(time.time()))
            self._set(record, pipe, progress=progress.model_dump_json())
            self._add_event(record, pipe, "progress", message)

        self._change(job_id, change)

    def succeed(self, job_id: str, attempt: int, result: JobResult, published_bytes: int = 0) -> None:
        """End with a result. What the attempt published becomes visible by this; twice is as good as once."""

        def change(record: Record, pipe: Pipeline) -> None:
            if record["status"] == JobStatus.SUCCEEDED and int(record["attempt"]) == attempt:
                return  # by a try whose answer was lost
            _check_attempt(record, attempt, JobStatus.RUNNING)
            progress = Progress.model_validate_json(record["progress"]).model_copy(
                update={"percent": 100.0, "eta_seconds": 0.0}
            )
            self._set(record, pipe, result=result.model_dump_json(), progress=progress.model_dump_json())
            counters.add(pipe, counters.PUBLISHED_BYTES, published_bytes)
            self._end(record, pipe, JobStatus.SUCCEEDED, result.verdict)

        self._change(job_id, change)

    def fail(self, job_id: str, attempt: int, error: C2IError) -> None:
        """End with an error."""

        def change(record: Record, pipe: Pipeline) -> None:
            _check_attempt(record, attempt, JobStatus.RUNNING)
            self._fail(record, pipe, error)

        self._change(job_id, change)

    def cancelled(self, job_id: str, attempt: int, *, reaped: bool = False) -> None:
        """The process of a job that was to be cancelled is gone."""

        def change(record: Record, pipe: Pipeline) -> None:
            _check_attempt(record, attempt, JobStatus.CANCELLING)
            if reaped:
                counters.add(pipe, counters.JOBS_REAPED)
            self._end(record, pipe, JobStatus.CANCELLED, "cancelled while it ran")

        self._change(job_id, change)

    def give_back(
        self,
        job_id: str,
        attempt: int,
        reason: str,
        *,
        crashed: bool,
        error: C2IError | None = None,
        reaped: bool = False,
    ) -> None:
        """Queue a running job again, before all others; fail it where it has crashed too often.

        Args:
            error: what it then fails with, where more is known than that its process died.
            reaped: not by its worker.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            _check_attempt(record, attempt, JobStatus.RUNNING)
            crashes = int(record["crashes"]) + crashed
            self._set(record, pipe, crashes=str(crashes))
            pipe.delete(_lease_key(job_id, attempt))
            if crashed:
                counters.add(pipe, counters.ATTEMPTS_LOST)
            if reaped:
                counters.add(pipe, counters.JOBS_REAPED)
            if crashes >= MAX_CRASHES:
                died = WorkerDied(
                    f"the job's process ended {crashes} times without a result, last: {reason}. Most often the "
                    "machine ran out of memory: send fewer or shorter examples, take a smaller model, or give "
                    "the worker more memory."
                )
                self._fail(record, pipe, error or died)
                return
            self._leave_stage(record, pipe)
            again = {"status": JobStatus.QUEUED.value, "queued_at": repr(time.time())}
            self._set(record, pipe, **again, progress=Progress().model_dump_json())
            self._deliver(record, pipe, at_front=True)
            self._add_event(record, pipe, "status", f"queued again: {reason}")

        self._change(job_id, change)

    # --- what the reaper does ------------------------------------------------------------------------------------

    def find_lost(self) -> dict[str, int]:
        """Jobs, with their attempts, that neither the queue nor a living worker has.

        A queued job is so for a moment on its way to a worker: only what stays lost is.
        """
        ids = [job_id.decode() for job_id in cast(set[bytes], self.redis.smembers("c2i:active"))]
        waiting = {entry.decode() for entry in cast(list[bytes], self.redis.lrange(self.deliveries.key, 0, -1))}
        lost: dict[str, int] = {}
        held: dict[str, set[str]] = {}
        for job_id, record in self._read_many(ids, "id", "status", "attempt", "deliveries", "owner"):
            if not record:
                self.redis.srem("c2i:active", job_id)
            elif record["status"] == JobStatus.QUEUED:
                owner = record.get("owner", "")
                if _delivery_id(record) in waiting:
                    continue
                if owner not in held:
                    held[owner] = self._held(owner)
                if _delivery_id(record) not in held[owner]:
                    lost[job_id] = int(record["attempt"])
            elif not self.redis.exists(_lease_key(job_id, int(record["attempt"]))):
                lost[job_id] = int(record["attempt"])
        return lost

    def recover(self, job_id: str, attempt: int) -> None:
        """Queue a lost job again, or end it where it was being cancelled."""

        def redeliver(record: Record, pipe: Pipeline) -> None:
            _check_attempt(record, attempt, JobStatus.QUEUED)
            self._withdraw(record, pipe)
            self._deliver(record, pipe, at_front=True)
            counters.add(pipe, counters.JOBS_REAPED)

        status = self.status(job_id)
        if status is JobStatus.QUEUED:
            self._change(job_id, redeliver)
        elif status is JobStatus.RUNNING:
            self.give_back(job_id, attempt, "its worker is gone", crashed=True, reaped=True)
        elif status is JobStatus.CANCELLING:
            self.cancelled(job_id, attempt, reaped=True)

    def census(self) -> Census:
        """How many jobs there are, for those who look on."""
        ids = [job_id.decode() for job_id in cast(set[bytes], self.redis.smembers("c2i:active"))]
        records = [record for _, record in self._read_many(ids, "status", "queued_at") if record]
        queued = [float(record["queued_at"]) for record in records if record["status"] == JobStatus.QUEUED]
        return Census(
            by_status=Counter(JobStatus(record["status"]) for record in records),
            kept=int(self.redis.zcard("c2i:jobs")),
            depth=int(self.redis.llen(self.deliveries.key)),
            oldest=min(queued, default=None),
        )

    def expire(self) -> None:
        """Delete jobs that ended longer ago than they are kept. Nothing else does: the records have no TTL of Redis."""
        before = time.time() - self._ttl.total_seconds()
        for job_id in cast(list[bytes], self.redis.zrangebyscore(ENDED, "-inf", before, 0, EXPIRE_BATCH)):
            try:
                self.delete(job_id.decode())
            except JobNotFound:
                self.redis.zrem(ENDED, job_id)

    def deleted(self) -> list[str]:
        """Deleted jobs whose files may still be there."""
        return [job_id.decode() for job_id in cast(set[bytes], self.redis.smembers(DELETED))]

    def exists(self, job_id: str) -> bool:
        """Whether there is a record."""
        return bool(self.redis.exists(_job_key(job_id)))

    def prune(self) -> None:
        """Remove from the indexes what has expired: its owner may never list it."""
        for index in ("c2i:jobs", OWNED):
            entries = (entry for entry, _ in self.redis.zscan_iter(index, count=PRUNE_BATCH))
            while batch := list(islice(entries, PRUNE_BATCH)):
                with self.redis.pipeline(transaction=False) as pipe:
                    for entry in batch:
                        pipe.exists(_job_key(entry.decode().rpartition(":")[2]))
                    gone = [entry for entry, there in zip(batch, pipe.execute(), strict=True) if not there]
                if gone:
                    self.redis.zrem(index, *gone)

    # --- keys and transactions -----------------------------------------------------------------------------------

    def _claimed(self, job_id: str) -> Job:
        try:
            return self.get(job_id)
        except JobNotFound:
            raise Conflict(
                f"this key created {job_id}, which was deleted since; send another key to create another job",
                param=idempotency.NAME,
            ) from None

    def _check_waiting(self, pipe: Pipeline, owner: str) -> None:
        """In a transaction that has not begun: the owner's waiting jobs, watched where they are near the limit."""
        if self.limits.waiting is None:
            return
        key = fairness.waiting_key(owner)
        if int(pipe.zcard(key)) >= self.limits.waiting - NEAR_LIMIT:
            pipe.watch(key)
            self.limits.check_waiting(int(pipe.zcard(key)))

    def _position(self, record: Record) -> int:
        """Of a queued job: 1 is the next."""
        delivery, owner = _delivery_id(record), record.get("owner", "")
        ahead = cast(int | None, self.redis.lpos(self.deliveries.key, delivery))
        if ahead is not None and self.limits.running is None:
            return ahead + 1
        held = fairness.held_before(self.redis, delivery, owner)
        if ahead is None and self.redis.zscore(fairness.held_key(owner), delivery) is not None:
            ahead = fairness.list_before(self.redis, owner, held)
        return (ahead or 0) + held + 1

    def _held(self, owner: str) -> set[str]:
        """Deliveries that wait for another job of their owner's, where there is one."""
        if not self.redis.exists(_running_key(owner)):
            return set()
        return {entry.decode() for entry in cast(list[bytes], self.redis.zrange(fairness.held_key(owner), 0, -1))}

    def _change(self, job_id: str, change: Change, owner: str | None = None, look: Change | None = None) -> None:
        """One transaction on a record: `change` sees it and queues commands, or raises and nothing happens.

        Args:
            look: reads and watches more, before commands are queued.
        """
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(_job_key(job_id))
                    record = _decode(cast(dict[bytes, bytes], pipe.hgetall(_job_key(job_id))))
                    _check_found(record, job_id, owner)
                    if look:
                        look(record, pipe)
                    pipe.multi()
                    change(record, pipe)
                    pipe.execute()
                except WatchError:
                    continue
                return

    def _set(self, record: Record, pipe: Pipeline, **fields: str) -> None:
        record.update(fields)
        pipe.hset(_job_key(record["id"]), mapping=cast(Any, fields))
        if "status" in fields:
            self._count(record, pipe)

    def _count(self, record: Record, pipe: Pipeline) -> None:
        """Keep the owner's running jobs as the record's new status is; where one leaves, a held one may start."""
        job_id, owner, status = record["id"], record.get("owner", ""), record["status"]
        if status in (JobStatus.RUNNING, JobStatus.CANCELLING):
            pipe.sadd(_running_key(owner), job_id)
            return
        pipe.srem(_running_key(owner), job_id)
        if int(record["attempt"]) or status != JobStatus.QUEUED:
            fairness.release(pipe, self.deliveries.key, owner)

    def _deliver(self, record: Record, pipe: Pipeline, *, at_front: bool = False) -> None:
        self._set(record, pipe, deliveries=str(int(record["deliveries"]) + 1))
        delivery = _delivery_id(record)
        self.deliveries.enqueue_call("adapt", args=[record["id"]], job_id=delivery, at_front=at_front, pipeline=pipe)
        if at_front:
            fairness.place_first(pipe, self.deliveries.key, delivery, record.get("owner", ""))
        else:
            fairness.place(pipe, self.deliveries.key, delivery, record.get("owner", ""))

    def _withdraw(self, record: Record, pipe: Pipeline, *, started: bool = False) -> None:
        delivery = _delivery_id(record)
        pipe.lrem(self.deliveries.key, 0, delivery)
        pipe.lrem(self.deliveries.intermediate_queue_key, 0, delivery)
        pipe.delete(f"rq:job:{delivery}")
        fairness.leave(pipe, self.deliveries.key, delivery, record.get("owner", ""), started=started)

    def _fail(self, record: Record, pipe: Pipeline, error: C2IError) -> None:
        described = JobError(code=error.code, message=error.message, param=error.param, retryable=error.retryable)
        self._set(record, pipe, error=described.model_dump_json())
        self._end(record, pipe, JobStatus.FAILED, error.message)

    def _leave_stage(self, record: Record, pipe: Pipeline) -> None:
        """Count how long the attempt was in the stage that it leaves."""
        if stage := record.get("stage"):
            counters.add(pipe, counters.STAGES, label=stage)
            counters.add(pipe, counters.STAGE_SECONDS, _since(record, "stage_at"), label=stage)
            pipe.hdel(_job_key(record["id"]), "stage", "stage_at")

    def _end(self, record: Record, pipe: Pipeline, status: JobStatus, message: str) -> None:
        self._leave_stage(record, pipe)
        counters.add(pipe, counters.JOBS_ENDED, label=status.value)
        self._set(record, pipe, status=status.value, finished_at=_now())
        self._add_event(record, pipe, "status", message)
        pipe.srem("c2i:active", record["id"])
        pipe.delete(_lease_key(record["id"], int(record["attempt"])))
        pipe.zadd(ENDED, {record["id"]: time.time()})
        outbox.add(pipe, record)

    def _add_event(self, record: Record, pipe: Pipeline, kind: str, message: str) -> None:
        event = {
            "created_at": _now(),
            "kind": kind,
            "message": message,
            "status": record["status"],
            "progress": json.loads(record["progress"]),
        }
        pipe.xadd(_events_key(record["id"]), {"event": json.dumps(event)}, maxlen=MAX_EVENTS, approximate=False)
        pipe.publish(CHANGES, record["id"])

    def _read(self, job_id: str) -> Record:
        return _decode(cast(dict[bytes, bytes], self.redis.hgetall(_job_key(job_id))))

    def _read_many(self, job_ids: list[str], *fields: str) -> Iterator[tuple[str, Record]]:
        """Some fields of each record, a trip for hundreds of them; an empty record is gone."""
        for start in range(0, len(job_ids), BATCH):
            batch = job_ids[start : start + BATCH]
            with self.redis.pipeline(transaction=False) as pipe:
                for job_id in batch:
                    pipe.hmget(_job_key(job_id), *fields)
                found = cast(list[list[bytes | None]], pipe.execute())
            for job_id, values in zip(batch, found, strict=True):
                there = zip(fields, values, strict=True)
                yield job_id, {name: value.decode() for name, value in there if value is not None}

    def _record(self, job_id: str, owner: str | None) -> Record:
        record = self._read(job_id)
        _check_found(record, job_id, owner)
        return record


def check_job_id(job_id: str) -> None:
    """Raises JobNotFound for what is no job's ID, before it becomes part of a key."""
    if not JOB_ID.fullmatch(job_id):
        raise _not_found(job_id)


def check_event_id(event_id: str, param: str = "after") -> None:
    """Refuse what is not an event's `id`."""
    left, dash, right = event_id.partition("-")
    if not (dash and all(part.isascii() and part.isdigit() and len(part) < 19 for part in (left, right))):
        raise InvalidInput("not an event's `id`; take it from `GET /v1/jobs/{id}/events`", param=param)


def _job_key(job_id: str) -> str:
    return f"c2i:job:{job_id}"


def _running_key(owner: str) -> str:
    return f"c2i:running:{owner}"


def _events_key(job_id: str) -> str:
    return f"c2i:job:{job_id}:events"


def _lease_key(job_id: str, attempt: int) -> str:
    return f"c2i:job:{job_id}:lease:{attempt}"


def _delivery_id(record: Record) -> str:
    return f"{record['id']}-{record['deliveries']}"


def _decode(fields: dict[bytes, bytes]) -> Record:
    return {name.decode(): value.decode() for name, value in fields.items()}


def _job(record: Record, queue_position: int | None = None) -> Job:
    progress = json.loads(record["progress"]) | {"queue_position": queue_position}
    return Job.model_validate(
        {
            "id": record["id"],
            "status": record["status"],
            "model": record["model"],
            "strategy": record["strategy"],
            "created_at": record["created_at"],
            "started_at": record.get("started_at"),
            "finished_at": record.get("finished_at"),
            "attempt": int(record["attempt"]),
            "progress": progress,
            "result": json.loads(record.get("result", "null")),
            "error": json.loads(record.get("error", "null")),
            "metadata": json.loads(record["metadata"]),
            "webhook": outbox.state(record),
        }
    )


def _check_attempt(record: Record, attempt: int, expected: JobStatus) -> None:
    if int(record["attempt"]) != attempt or record["status"] != expected:
        raise Conflict(
            f"attempt {attempt} is out of date: the job is {record['status']} in attempt {record['attempt']}"
        )


def _check_found(record: Record, job_id: str, owner: str | None) -> None:
    if not record or owner not in (None, record.get("owner")):
        raise _not_found(job_id)


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"no job {job_id[:64]}; finished jobs are kept for a time and then forgotten")


def _since(record: Record, field: str) -> float:
    """Seconds since a time of the record's; clocks of two machines may differ by a little."""
    return max(0.0, time.time() - float(record.get(field) or time.time()))


def _now() -> str:
    return datetime.now(UTC).isoformat()

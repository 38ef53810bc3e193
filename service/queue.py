"""Jobs in Redis: what clients, workers and the reaper do with them.

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
    c2i:try:..., c2i:job:ID:tries  what was asked of its models: `service.tries.keys`
    c2i:job:ID:lease:ATTEMPT      a worker has it; it renews this, and the key lapses with the worker

rq is transport alone: a job's ID, as JSON, in its queue. Each delivery to a worker has an ID of its own,
`JOB-N`, so that a second delivery never touches what rq keeps of the first. Every change of a record is one
transaction that watches the record, so a change either saw the newest state or is made again.

A worker's writes carry the attempt they belong to and are refused once another attempt has begun.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError

from service import counters, fairness, idempotency
from service.connections import check_redis
from service.errors import C2IError, Conflict, JobNotFound, WorkerDied
from service.idempotency import Claim
from service.jobs import Job, JobEvent, JobResult, JobSpec, JobStatus, Progress
from service.limits import QueueLimits
from service.records import (
    Record,
    check_attempt,
    delivery_id,
    events_key,
    job_key,
    lease_key,
    not_found,
    now,
    running_key,
    settings_of,
    since,
    to_job,
)
from service.transactions import ENDED, Transactions
from service.tries import keys as tries
from service.webhooks import outbox

# A worker renews its lease every two seconds. A Redis that is away for less than this costs no running job, and a job
# whose worker is gone waits no longer.
LEASE_SECONDS = 18
# A job whose process was killed is tried three times in all.
MAX_CRASHES = 3
OWNED = "c2i:jobs:owned"
DELETED = "c2i:deleted"
# Jobs that expire at one look of the reaper.
EXPIRE_BATCH = 200
# Index entries whose records are looked for in one round trip.
PRUNE_BATCH = 500
# So near to its limit, an owner's submissions are counted one after the other.
NEAR_LIMIT = 64


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


class JobQueue(Transactions):
    """Records, events and deliveries of all jobs."""

    def __init__(self, redis: Redis, ttl: timedelta, limits: QueueLimits | None = None) -> None:
        super().__init__(redis)
        self.limits = limits or QueueLimits()
        self.outbox = outbox.Outbox(redis, job_key)
        self._ttl = ttl

    def check(self) -> None:
        """Raises Unavailable where Redis does not answer or is too old."""
        check_redis(self.redis)

    # --- what clients do: an `owner` sees its own jobs alone, None sees all ---------------------------------------

    def create(
        self,
        job_id: str,
        spec: JobSpec,
        owner: str = "",
        claim: Claim | None = None,
        more: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
    ) -> Job:
        """Store the record and queue the job, both or neither. Its input must be stored already.

        Args:
            owner: the ID of the key that submits it; empty where no keys are in use.
            claim: where it is another job's already, that job is returned and none is created.
            more: fields of the record that whoever submits it keeps.
            warnings: what its owner is told by events before the first.

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
            "created_at": now(),
            "queued_at": repr(time.time()),
            "attempt": "0",
            "crashes": "0",
            "deliveries": "0",
            "progress": Progress().model_dump_json(),
            "metadata": json.dumps(spec.metadata),
            "settings": settings_of(spec),
            **(more or {}),
        } | (outbox.fields(spec.webhook, owner) if spec.webhook else {})
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(job_key(job_id), *([claim.name] if claim else []))
                    if pipe.exists(job_key(job_id)):
                        break  # by a try whose answer was lost
                    if claim and (holder := claim.holder(pipe)):
                        return self._claimed(holder)
                    self._check_waiting(pipe, owner)
                    pipe.multi()
                    if claim:
                        claim.hold(pipe, job_id)
                    pipe.hset(job_key(job_id), mapping=cast(Any, record))
                    pipe.zadd("c2i:jobs", {job_id: 0})
                    if owner:
                        pipe.zadd(OWNED, {f"{owner}:{job_id}": 0})
                    pipe.sadd("c2i:active", job_id)
                    self._deliver(record, pipe)
                    counters.add(pipe, counters.JOBS_CREATED)
                    for warning in warnings:
                        self._add_event(record, pipe, "warning", warning)
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
            return to_job(record, queue_position=self._position(record))
        return to_job(record)

    def status(self, job_id: str, owner: str | None = None) -> JobStatus:
        """The status alone, cheaply."""
        status, theirs = cast(list[bytes | None], self.redis.hmget(job_key(job_id), "status", "owner"))
        if status is None or owner not in (None, (theirs or b"").decode()):
            raise not_found(job_id)
        return JobStatus(status.decode())

    def details(self, job_ids: Sequence[str], *fields: str) -> list[Record]:
        """Fields of the records of jobs that their owner was shown; empty for a job that is gone."""
        return [record for _, record in self._read_many(list(job_ids), *fields)]

    def list_jobs(
        self,
        limit: int,
        after: str | None = None,
        owner: str | None = None,
        wanted: Callable[[Job], bool] = lambda _: True,
    ) -> list[Job]:
        """Jobs from the newest to the oldest, at most `limit`, older than the job `after`, those that are wanted."""
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
                    job = self.get(entry.decode().removeprefix(prefix), owner)
                except JobNotFound:
                    self.redis.zrem(index, entry)  # expired
                    continue
                if wanted(job):
                    found.append(job)
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
            self.redis.xrange(events_key(job_id), f"({after}" if after else "-", "+"),
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
            pipe.delete(job_key(job_id), events_key(job_id))
            pipe.zrem("c2i:jobs", job_id)
            pipe.zrem(OWNED, f"{record.get('owner', '')}:{job_id}")
            pipe.zrem(ENDED, job_id)
            pipe.sadd(DELETED, job_id)
            outbox.forget(pipe, record)
            tries.forget(pipe, job_id)

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
            key = running_key(record.get("owner", ""))
            pipe.watch(key)
            running = int(pipe.scard(key))

        def change(record: Record, pipe: Pipeline) -> None:
            nonlocal attempt
            if record["status"] != JobStatus.QUEUED:
                raise Conflict(f"the job is {record['status']}, not queued")
            if self.limits.running is not None and running >= self.limits.running:
                pipe.lrem(self.deliveries.intermediate_queue_key, 0, delivery_id(record))
                fairness.hold(pipe, self.deliveries.key, delivery_id(record), record.get("owner", ""))
                attempt = 0
                return
            self._withdraw(record, pipe, started=True)
            if self.limits.running is not None and running + 1 < self.limits.running:
                fairness.release(pipe, self.deliveries.key, record.get("owner", ""))  # held under a lower limit
            attempt = int(record["attempt"]) + 1
            progress = Progress().model_dump_json()
            status = JobStatus.RUNNING.value
            self._set(record, pipe, status=status, attempt=str(attempt), started_at=now(), progress=progress)
            pipe.set(lease_key(job_id, attempt), "", ex=LEASE_SECONDS)
            counters.add(pipe, counters.ATTEMPTS)
            counters.add(pipe, counters.WAITS)
            counters.add(pipe, counters.WAIT_SECONDS, since(record, "queued_at"))
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
        self.redis.set(lease_key(job_id, attempt), "", ex=LEASE_SECONDS)

    def attempt_status(self, job_id: str, attempt: int) -> JobStatus | None:
        """The job's status, None where the attempt is not the current one."""
        status, current = cast(list[bytes | None], self.redis.hmget(job_key(job_id), "status", "attempt"))
        return JobStatus(status.decode()) if status and current and int(current) == attempt else None

    def progress(self, job_id: str, attempt: int, progress: Progress, message: str) -> None:
        """Record where the attempt is.

        Raises:
            Conflict: it is to stop.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.RUNNING)
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
            check_attempt(record, attempt, JobStatus.RUNNING)
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
            check_attempt(record, attempt, JobStatus.RUNNING)
            self._fail(record, pipe, error)

        self._change(job_id, change)

    def cancelled(self, job_id: str, attempt: int, *, reaped: bool = False) -> None:
        """The process of a job that was to be cancelled is gone."""

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.CANCELLING)
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
            check_attempt(record, attempt, JobStatus.RUNNING)
            crashes = int(record["crashes"]) + crashed
            self._set(record, pipe, crashes=str(crashes))
            pipe.delete(lease_key(job_id, attempt))
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
                if delivery_id(record) in waiting:
                    continue
                if owner not in held:
                    held[owner] = self._held(owner)
                if delivery_id(record) not in held[owner]:
                    lost[job_id] = int(record["attempt"])
            elif not self.redis.exists(lease_key(job_id, int(record["attempt"]))):
                lost[job_id] = int(record["attempt"])
        return lost

    def recover(self, job_id: str, attempt: int) -> None:
        """Queue a lost job again, or end it where it was being cancelled."""

        def redeliver(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.QUEUED)
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
        return bool(self.redis.exists(job_key(job_id)))

    def prune(self) -> None:
        """Remove from the indexes what has expired: its owner may never list it."""
        for index in ("c2i:jobs", OWNED):
            entries = (entry for entry, _ in self.redis.zscan_iter(index, count=PRUNE_BATCH))
            while batch := list(islice(entries, PRUNE_BATCH)):
                with self.redis.pipeline(transaction=False) as pipe:
                    for entry in batch:
                        pipe.exists(job_key(entry.decode().rpartition(":")[2]))
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
        delivery, owner = delivery_id(record), record.get("owner", "")
        ahead = cast(int | None, self.redis.lpos(self.deliveries.key, delivery))
        if ahead is not None and self.limits.running is None:
            return ahead + 1
        held = fairness.held_before(self.redis, delivery, owner)
        if ahead is None and self.redis.zscore(fairness.held_key(owner), delivery) is not None:
            ahead = fairness.list_before(self.redis, owner, held)
        return (ahead or 0) + held + 1

    def _held(self, owner: str) -> set[str]:
        """Deliveries that wait for another job of their owner's, where there is one."""
        if not self.redis.exists(running_key(owner)):
            return set()
        return {entry.decode() for entry in cast(list[bytes], self.redis.zrange(fairness.held_key(owner), 0, -1))}

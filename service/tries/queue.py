"""Tries in Redis: what clients, workers and the reaper do with them (the keys: `service.tries.keys`).

They have a queue of their own and a worker that takes nothing else, since an adaptation may keep a worker for hours.
The discipline is that of `service.queue`: every change is one transaction that watches the record, a worker's writes
carry their attempt, and rq has the ID alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq import Queue
from rq.serializers import JSONSerializer

from service import counters
from service.errors import C2IError, Conflict, NotFound, TooManyRequests, WorkerDied
from service.jobs import Job, JobError, JobStatus
from service.queue import LEASE_SECONDS
from service.records import Record, check_attempt, decode, delivery_id, job_key, new_id, not_found, now
from service.transactions import CHANGES
from service.tries.contract import Answer, Try, TrySpec
from service.tries.keys import QUEUE, UNENDED, lease_key, tries_key, try_key

# Of a record, from its last change on.
TTL_SECONDS = 3600
# A try whose process was killed is made twice in all.
MAX_CRASHES = 2
# That have not ended: of one caller, and of everybody.
MOST_OF_A_CALLER = 8
MOST = 64
RETRY_AFTER_SECONDS = 5

Change = Callable[[Record, Pipeline], None]


@dataclass(frozen=True)
class Question:
    """What a worker is to do."""

    job_id: str
    job_attempt: int
    """The attempt of the job that published its artifacts."""
    prompt: str
    max_tokens: int


class TryQueue:
    """Records and deliveries of all tries. What workers and the reaper call is named as in `JobQueue`."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.deliveries = Queue(QUEUE, connection=redis, serializer=JSONSerializer, default_timeout=-1)

    # --- what clients do: whoever sees the job sees its tries ------------------------------------------------------

    def create(self, job: Job, spec: TrySpec, owner: str = "") -> Try:
        """Store the record and queue the try, both or neither.

        Args:
            owner: the ID of the key that asks; empty where no keys are in use.

        Raises:
            JobNotFound: the job is gone meanwhile.
            TooManyRequests: as many wait as may.
        """
        record = {
            "id": new_id("try"),
            "owner": owner,
            "job_id": job.id,
            "job_attempt": str(job.attempt),
            "status": JobStatus.QUEUED.value,
            "created_at": now(),
            "attempt": "0",
            "crashes": "0",
            "deliveries": "0",
            "prompt": spec.prompt,
            "max_tokens": str(spec.max_tokens),
        }
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(job_key(job.id), UNENDED)
                    if not pipe.exists(job_key(job.id)):
                        raise not_found(job.id)
                    self._check_waiting(cast(set[bytes], pipe.smembers(UNENDED)), owner)
                    pipe.multi()
                    self._set(record, pipe, **record)
                    pipe.sadd(UNENDED, _entry(record))
                    pipe.sadd(tries_key(job.id), record["id"])
                    pipe.expire(tries_key(job.id), TTL_SECONDS)
                    self._deliver(record, pipe)
                    pipe.execute()
                except WatchError:
                    continue
                return self.get(record["id"], job.id)

    def get(self, try_id: str, job_id: str) -> Try:
        """The try as clients see it.

        Raises:
            NotFound: there is none at this job, or not any more.
        """
        record = self._read(try_id)
        if not record or record["job_id"] != job_id:
            raise _gone()
        answers = {name: Answer(text=record[name]) if name in record else None for name in ("base", "adapted")}
        error = JobError.model_validate_json(record["error"]) if "error" in record else None
        shown = {name: record[name] for name in ("id", "job_id", "status", "created_at")}
        return Try.model_validate({**shown, **answers, "error": error})

    def waiting(self) -> bool:
        """Whether any waits for a worker."""
        return bool(self.redis.llen(self.deliveries.key))

    # --- what workers do -----------------------------------------------------------------------------------------

    def start(self, try_id: str) -> int:
        """Take a queued try; the number of the attempt that begins, with its lease.

        Raises:
            Conflict: another worker has it.
            NotFound: it has lapsed, or its job was deleted.
        """
        attempt = 0

        def change(record: Record, pipe: Pipeline) -> None:
            nonlocal attempt
            check_attempt(record, int(record["attempt"]), JobStatus.QUEUED)
            self._withdraw(record, pipe)
            attempt = int(record["attempt"]) + 1
            self._set(record, pipe, status=JobStatus.RUNNING.value, attempt=str(attempt))
            pipe.set(lease_key(try_id, attempt), "", ex=LEASE_SECONDS)

        self._change(try_id, change)
        return attempt

    def drop(self, delivery: str) -> None:
        """Throw away a delivery of a try that is not to be started."""
        self.redis.lrem(self.deliveries.intermediate_queue_key, 0, delivery)
        self.redis.delete(f"rq:job:{delivery}")

    def renew_lease(self, try_id: str, attempt: int) -> None:
        """Say that the attempt's worker lives."""
        self.redis.set(lease_key(try_id, attempt), "", ex=LEASE_SECONDS)

    def attempt_status(self, try_id: str, attempt: int) -> JobStatus | None:
        """The try's status, None where it is gone or the attempt is not the current one."""
        status, current = cast(list[bytes | None], self.redis.hmget(try_key(try_id), "status", "attempt"))
        return JobStatus(status.decode()) if status and current and int(current) == attempt else None

    def question(self, try_id: str) -> Question:
        """What is asked.

        Raises:
            NotFound: its job was deleted.
        """
        record = self._read(try_id)
        if "prompt" not in record:
            raise _gone()
        return Question(record["job_id"], int(record["job_attempt"]), record["prompt"], int(record["max_tokens"]))

    def answer_base(self, try_id: str, attempt: int, text: str) -> None:
        """Record the base's answer. The adapted model's is still to come."""

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.RUNNING)
            self._set(record, pipe, base=text)

        self._change(try_id, change)

    def succeed(self, try_id: str, attempt: int, text: str) -> None:
        """End with the adapted model's answer."""

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.RUNNING)
            self._set(record, pipe, adapted=text)
            self._end(record, pipe, JobStatus.SUCCEEDED)

        self._change(try_id, change)

    def fail(self, try_id: str, attempt: int, error: C2IError) -> None:
        """End with an error."""

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.RUNNING)
            self._fail(record, pipe, error)

        self._change(try_id, change)

    def cancelled(self, try_id: str, attempt: int) -> None:
        """Raises Conflict: nobody can ask for it."""
        raise Conflict("a try is not cancelled; it ends within a minute")

    def give_back(
        self,
        try_id: str,
        attempt: int,
        reason: str,
        *,
        crashed: bool,
        error: C2IError | None = None,
    ) -> None:
        """Queue a running try again, before all others; fail it where it has crashed too often.

        Args:
            error: what it then fails with, where more is known than that its process died.
        """

        def change(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.RUNNING)
            crashes = int(record["crashes"]) + crashed
            pipe.delete(lease_key(try_id, attempt))
            if crashes >= MAX_CRASHES:
                died = WorkerDied(f"the process that was to answer ended {crashes} times, last: {reason}")
                self._fail(record, pipe, error or died)
                return
            self._set(record, pipe, status=JobStatus.QUEUED.value, crashes=str(crashes))
            self._deliver(record, pipe, at_front=True)

        self._change(try_id, change)

    # --- what the reaper does ------------------------------------------------------------------------------------

    def find_lost(self) -> dict[str, int]:
        """Tries, with their attempts, that neither the queue nor a living worker has, as `JobQueue.find_lost`."""
        waiting = {entry.decode() for entry in cast(list[bytes], self.redis.lrange(self.deliveries.key, 0, -1))}
        lost: dict[str, int] = {}
        queued = set[str]()
        for entry in cast(set[bytes], self.redis.smembers(UNENDED)):
            record = self._read(entry.decode().rpartition("|")[2])
            if not record:
                self.redis.srem(UNENDED, entry)  # lapsed
                continue
            attempt = int(record["attempt"])
            if record["status"] == JobStatus.QUEUED:
                queued.add(delivery_id(record))
                if delivery_id(record) not in waiting:
                    lost[record["id"]] = attempt
            elif not self.redis.exists(lease_key(record["id"], attempt)):
                lost[record["id"]] = attempt
        for delivery in waiting - queued:  # of one that has lapsed
            self.redis.lrem(self.deliveries.key, 0, delivery)
        return lost

    def recover(self, try_id: str, attempt: int) -> None:
        """Queue a lost try again."""

        def redeliver(record: Record, pipe: Pipeline) -> None:
            check_attempt(record, attempt, JobStatus.QUEUED)
            self._withdraw(record, pipe)
            self._deliver(record, pipe, at_front=True)

        if self.attempt_status(try_id, attempt) is JobStatus.RUNNING:
            self.give_back(try_id, attempt, "its worker is gone", crashed=True)
        else:
            self._change(try_id, redeliver)

    # --- keys and transactions -----------------------------------------------------------------------------------

    def _change(self, try_id: str, change: Change) -> None:
        """One transaction on a record: `change` sees it and queues commands, or raises and nothing happens."""
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(try_key(try_id))
                    record = decode(cast(dict[bytes, bytes], pipe.hgetall(try_key(try_id))))
                    if not record:
                        raise _gone()
                    pipe.multi()
                    change(record, pipe)
                    pipe.publish(CHANGES, try_id)
                    pipe.execute()
                except WatchError:
                    continue
                return

    def _set(self, record: Record, pipe: Pipeline, **fields: str) -> None:
        record.update(fields)
        pipe.hset(try_key(record["id"]), mapping=cast(Any, fields))
        pipe.expire(try_key(record["id"]), TTL_SECONDS)
        pipe.expire(UNENDED, TTL_SECONDS)

    def _deliver(self, record: Record, pipe: Pipeline, *, at_front: bool = False) -> None:
        self._set(record, pipe, deliveries=str(int(record["deliveries"]) + 1))
        delivery = delivery_id(record)
        self.deliveries.enqueue_call(
            "answer", args=[record["id"]], job_id=delivery, at_front=at_front, ttl=TTL_SECONDS, pipeline=pipe
        )

    def _withdraw(self, record: Record, pipe: Pipeline) -> None:
        delivery = delivery_id(record)
        pipe.lrem(self.deliveries.key, 0, delivery)
        pipe.lrem(self.deliveries.intermediate_queue_key, 0, delivery)
        pipe.delete(f"rq:job:{delivery}")

    def _fail(self, record: Record, pipe: Pipeline, error: C2IError) -> None:
        described = JobError(code=error.code, message=error.message, param=error.param, retryable=error.retryable)
        self._set(record, pipe, error=described.model_dump_json())
        self._end(record, pipe, JobStatus.FAILED)

    def _end(self, record: Record, pipe: Pipeline, status: JobStatus) -> None:
        self._set(record, pipe, status=status.value)
        pipe.hdel(try_key(record["id"]), "prompt")
        pipe.srem(UNENDED, _entry(record))
        pipe.delete(lease_key(record["id"], int(record["attempt"])))
        counters.add(pipe, counters.TRIES_ENDED, label=status.value)

    def _check_waiting(self, entries: set[bytes], owner: str) -> None:
        own = sum(entry.decode().rpartition("|")[0] == owner for entry in entries)
        if own >= MOST_OF_A_CALLER or len(entries) >= MOST:
            what = f"{own} of your tries" if own >= MOST_OF_A_CALLER else f"{len(entries)} tries"
            raise TooManyRequests(
                f"{what} wait for their answers, the most allowed; try again when one has them",
                retry_after=RETRY_AFTER_SECONDS,
            )

    def _read(self, try_id: str) -> Record:
        return decode(cast(dict[bytes, bytes], self.redis.hgetall(try_key(try_id))))


def _entry(record: Record) -> str:
    return f"{record['owner']}|{record['id']}"


def _gone() -> NotFound:
    return NotFound("no such try at this job; tries are kept for an hour")

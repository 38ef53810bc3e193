"""Changes of a record: each one transaction that saw the newest state, with the event, the order and the counts that
belong to it. The keys are those of `service.queue`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError
from rq import Queue
from rq.serializers import JSONSerializer

from service import counters, fairness
from service.errors import C2IError
from service.jobs import JobError, JobStatus
from service.records import (
    Record,
    check_found,
    decode,
    delivery_id,
    events_key,
    job_key,
    lease_key,
    now,
    running_key,
    since,
)
from service.webhooks import outbox

QUEUE = "c2i"
# Where the ID of a job is published at each of its events.
CHANGES = "c2i:changes"
ENDED = "c2i:ended"
MAX_EVENTS = 1_000
# Of this many records something is asked in one trip.
BATCH = 500

Change = Callable[[Record, Pipeline], None]


class Transactions:
    """What every change of a record is made of."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.deliveries = Queue(QUEUE, connection=redis, serializer=JSONSerializer, default_timeout=-1)

    def _change(self, job_id: str, change: Change, owner: str | None = None, look: Change | None = None) -> None:
        """One transaction on a record: `change` sees it and queues commands, or raises and nothing happens.

        Args:
            look: reads and watches more, before commands are queued.
        """
        with self.redis.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(job_key(job_id))
                    record = decode(cast(dict[bytes, bytes], pipe.hgetall(job_key(job_id))))
                    check_found(record, job_id, owner)
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
        pipe.hset(job_key(record["id"]), mapping=cast(Any, fields))
        if "status" in fields:
            self._count(record, pipe)

    def _count(self, record: Record, pipe: Pipeline) -> None:
        """Keep the owner's running jobs as the record's new status is; where one leaves, a held one may start."""
        job_id, owner, status = record["id"], record.get("owner", ""), record["status"]
        if status in (JobStatus.RUNNING, JobStatus.CANCELLING):
            pipe.sadd(running_key(owner), job_id)
            return
        pipe.srem(running_key(owner), job_id)
        if int(record["attempt"]) or status != JobStatus.QUEUED:
            fairness.release(pipe, self.deliveries.key, owner)

    def _deliver(self, record: Record, pipe: Pipeline, *, at_front: bool = False) -> None:
        self._set(record, pipe, deliveries=str(int(record["deliveries"]) + 1))
        delivery = delivery_id(record)
        self.deliveries.enqueue_call("adapt", args=[record["id"]], job_id=delivery, at_front=at_front, pipeline=pipe)
        if at_front:
            fairness.place_first(pipe, self.deliveries.key, delivery, record.get("owner", ""))
        else:
            fairness.place(pipe, self.deliveries.key, delivery, record.get("owner", ""))

    def _withdraw(self, record: Record, pipe: Pipeline, *, started: bool = False) -> None:
        delivery = delivery_id(record)
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
            counters.add(pipe, counters.STAGE_SECONDS, since(record, "stage_at"), label=stage)
            pipe.hdel(job_key(record["id"]), "stage", "stage_at")

    def _end(self, record: Record, pipe: Pipeline, status: JobStatus, message: str) -> None:
        self._leave_stage(record, pipe)
        counters.add(pipe, counters.JOBS_ENDED, label=status.value)
        self._set(record, pipe, status=status.value, finished_at=now())
        self._add_event(record, pipe, "status", message)
        pipe.srem("c2i:active", record["id"])
        pipe.delete(lease_key(record["id"], int(record["attempt"])))
        pipe.zadd(ENDED, {record["id"]: time.time()})
        outbox.add(pipe, record)

    def _add_event(self, record: Record, pipe: Pipeline, kind: str, message: str) -> None:
        event = {
            "created_at": now(),
            "kind": kind,
            "message": message,
            "status": record["status"],
            "progress": json.loads(record["progress"]),
        }
        pipe.xadd(events_key(record["id"]), {"event": json.dumps(event)}, maxlen=MAX_EVENTS, approximate=False)
        pipe.publish(CHANGES, record["id"])

    def _read(self, job_id: str) -> Record:
        return decode(cast(dict[bytes, bytes], self.redis.hgetall(job_key(job_id))))

    def _read_many(self, job_ids: list[str], *fields: str) -> Iterator[tuple[str, Record]]:
        """Some fields of each record, a trip for hundreds of them; an empty record is gone."""
        for start in range(0, len(job_ids), BATCH):
            batch = job_ids[start : start + BATCH]
            with self.redis.pipeline(transaction=False) as pipe:
                for job_id in batch:
                    pipe.hmget(job_key(job_id), *fields)
                found = cast(list[list[bytes | None]], pipe.execute())
            for job_id, values in zip(batch, found, strict=True):
                there = zip(fields, values, strict=True)
                yield job_id, {name: value.decode() for name, value in there if value is not None}

    def _record(self, job_id: str, owner: str | None) -> Record:
        record = self._read(job_id)
        check_found(record, job_id, owner)
        return record

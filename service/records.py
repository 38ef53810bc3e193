"""A job's record: its keys, its fields, and the job that it shows clients."""

from __future__ import annotations

import json
import re
import secrets
import time
from datetime import UTC, datetime

from service.errors import Conflict, InvalidInput, JobNotFound
from service.jobs import Job, JobSpec, JobStatus
from service.webhooks import outbox

JOB_ID = re.compile(r"job_[0-9a-z]{20}")

Record = dict[str, str]


def new_job_id() -> str:
    """A job's ID; see `new_id`."""
    return new_id("job")


def new_id(kind: str) -> str:
    """Random, and sorted by the time it was made: ten digits of milliseconds in base 32, ten random ones."""
    return f"{kind}_" + _base32(time.time_ns() // 1_000_000) + _base32(secrets.randbits(50))


def _base32(number: int) -> str:
    return "".join("0123456789abcdefghjkmnpqrstvwxyz"[number >> shift & 31] for shift in range(45, -5, -5))


def check_job_id(job_id: str) -> None:
    """Raises JobNotFound for what is no job's ID, before it becomes part of a key."""
    if not JOB_ID.fullmatch(job_id):
        raise not_found(job_id)


def check_event_id(event_id: str, param: str = "after") -> None:
    """Refuse what is not an event's `id`."""
    left, dash, right = event_id.partition("-")
    if not (dash and all(part.isascii() and part.isdigit() and len(part) < 19 for part in (left, right))):
        raise InvalidInput("not an event's `id`; take it from `GET /v1/jobs/{id}/events`", param=param)


def job_key(job_id: str) -> str:
    """The hash of a job's record."""
    return f"c2i:job:{job_id}"


def running_key(owner: str) -> str:
    """The set of an owner's jobs that a worker has."""
    return f"c2i:running:{owner}"


def events_key(job_id: str) -> str:
    """The stream of what happened to a job."""
    return f"c2i:job:{job_id}:events"


def lease_key(job_id: str, attempt: int) -> str:
    """What a worker renews for as long as it has the attempt."""
    return f"c2i:job:{job_id}:lease:{attempt}"


def delivery_id(record: Record) -> str:
    """Of the newest delivery of a job: a later one never touches what rq keeps of an earlier."""
    return f"{record['id']}-{record['deliveries']}"


def decode(fields: dict[bytes, bytes]) -> Record:
    """A record as Redis returns it; empty where there is none."""
    return {name.decode(): value.decode() for name, value in fields.items()}


def settings_of(spec: JobSpec) -> str:
    """What a record keeps of a job's settings: the spec itself, with its examples, is in the artifact store."""
    kept = spec.model_dump(
        mode="json",
        include={"goal", "target", "strategy_options", "passes", "objective", "seed", "max_drift", "prompt_format"},
    )
    return json.dumps(kept | {"validation": spec.validation is not None})


def to_job(record: Record, queue_position: int | None = None) -> Job:
    """The job that a client sees."""
    progress = json.loads(record["progress"]) | {"queue_position": queue_position}
    return Job.model_validate(
        {
            "id": record["id"],
            "status": record["status"],
            "model": record["model"],
            "goal": json.loads(record.get("settings", "{}")).get("goal", "improve"),
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


def check_attempt(record: Record, attempt: int, expected: JobStatus) -> None:
    """Raises Conflict where another attempt has begun or the job is in another state."""
    if int(record["attempt"]) != attempt or record["status"] != expected:
        raise Conflict(
            f"attempt {attempt} is out of date: the job is {record['status']} in attempt {record['attempt']}"
        )


def check_found(record: Record, job_id: str, owner: str | None) -> None:
    """Raises JobNotFound where there is no record, or it is not this owner's; None owns all."""
    if not record or owner not in (None, record.get("owner")):
        raise not_found(job_id)


def not_found(job_id: str) -> JobNotFound:
    """The same error for what is gone and for what belongs to another."""
    return JobNotFound(f"no job {job_id[:64]}; finished jobs are kept for a time and then forgotten")


def since(record: Record, field: str) -> float:
    """Seconds since a time of the record's; clocks of two machines may differ by a little."""
    return max(0.0, time.time() - float(record.get(field) or time.time()))


def now() -> str:
    """The time as records and events tell it."""
    return datetime.now(UTC).isoformat()

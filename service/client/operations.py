"""What can be asked of the service, each as the steps that it takes (`service.client.steps`)."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from service.answers import Estimate, FileList, FileOut, JobList, ModelList, ModelOut
from service.client.asking import RETRY_SECONDS, Terms, ask, open_stream, parse
from service.client.steps import Emit, Flow, Pause, Request, Stream, read
from service.errors import NotFound
from service.idempotency import NAME as IDEMPOTENCY_KEY
from service.jobs import Job, JobEvent, JobSpec
from service.reports import Report

Spec = JobSpec | Mapping[str, Any]

# Of a long poll: below the minute after which proxies cut off what is silent.
WAIT_SECONDS = 20.0
PAGE = 100


def submit(terms: Terms, spec: Spec, *, idempotency_key: str | None = None) -> Flow[Job]:
    """Create a job.

    Args:
        spec: the body of `POST /v1/jobs`.
        idempotency_key: the same key and spec give the same job for 24 hours. Without it the call has one of its own,
            so that its own repetitions create one job.
    """
    headers = {IDEMPOTENCY_KEY: idempotency_key or str(uuid.uuid4())}
    response = yield from ask(terms, _post(spec, headers=headers))
    return parse(terms, response, Job)


def estimate(terms: Terms, spec: Spec) -> Flow[Estimate]:
    """Check a job and tell what it would take; nothing is created."""
    response = yield from ask(terms, _post(spec, params={"dry_run": "true"}))
    return parse(terms, response, Estimate)


def _post(spec: Spec, *, params: dict[str, str] | None = None, headers: dict[str, str] | None = None) -> Request:
    if isinstance(spec, JobSpec):
        body = spec.model_dump_json(exclude_unset=True)
    else:
        body = json.dumps(spec, ensure_ascii=False, allow_nan=False)
    json_type = {"Content-Type": "application/json"}
    return Request("POST", "/v1/jobs", params or {}, json_type | (headers or {}), body.encode())


def _job(job_id: str, below: str = "") -> str:
    # Whatever was typed is one segment of the path.
    return f"/v1/jobs/{quote(job_id, safe='')}{below}"


def get(terms: Terms, job_id: str, *, wait: float = 0) -> Flow[Job]:
    """A job, once it has ended or after `wait` seconds, 60 at most."""
    response = yield from ask(terms, Request("GET", f"/v1/jobs/{quote(job_id, safe='')}", {"wait": wait}))
    return parse(terms, response, Job)


def wait(terms: Terms, job_id: str, *, timeout: float | None = None) -> Flow[Job]:
    """A job at its end, whichever that is.

    Raises:
        TimeoutError: it goes on after `timeout` seconds.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        job = yield from get(terms, job_id, wait=round(min(WAIT_SECONDS, max(left, 0)), 3))
        if job.status.terminal:
            return job
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"{job_id} is {job.status.value} after {timeout:g} s")


def cancel(terms: Terms, job_id: str) -> Flow[Job]:
    """Stop a job; its process is gone when it is `cancelled`."""
    response = yield from ask(terms, Request("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel"))
    return parse(terms, response, Job)


def delete(terms: Terms, job_id: str) -> Flow[None]:
    """Forget a job that has ended, with its examples and artifacts."""
    yield from ask(terms, Request("DELETE", f"/v1/jobs/{quote(job_id, safe='')}"), done_if=NotFound)


def jobs(terms: Terms, *, limit: int | None = None) -> Stream[Job]:
    """Your jobs, newest first, at most `limit`; a page of them is asked for when it is needed."""
    after: str | None = None
    given = 0
    while limit is None or given < limit:
        size = PAGE if limit is None else min(PAGE, limit - given)
        params = {"limit": size} | ({"after": after} if after else {})
        page = parse(terms, (yield from ask(terms, Request("GET", "/v1/jobs", params))), JobList)
        for job in page.data:
            yield Emit(job)
        given += len(page.data)
        after = page.next
        if after is None:
            return


def events(terms: Terms, job_id: str, *, after: str | None = None) -> Stream[JobEvent]:
    """A job's events from its first, or the one behind `after`, to its end, as they come. A stream that is cut off is
    opened again behind the last event.

    Raises:
        Unavailable: the service was gone for longer than the client's patience.
    """
    silent_since: float | None = None
    while True:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        response = yield from open_stream(
            terms, Request("GET", f"/v1/jobs/{quote(job_id, safe='')}/events", headers=headers)
        )
        if response.status_code == httpx.codes.NO_CONTENT:
            return  # it has ended, and there is nothing behind `after`
        text = b""
        try:
            while piece := (yield from read()):
                *lines, text = (text + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        event = JobEvent.model_validate_json(line.removeprefix(b"data: "), extra="ignore")
                        after, silent_since = event.id, None
                        yield Emit(event)
                        if event.status.terminal:
                            return
        except httpx.TransportError as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > terms.patience:
                raise terms.unreachable(error) from None
        yield Pause(RETRY_SECONDS)


def report(terms: Terms, job_id: str) -> Flow[Report]:
    """What a job gained on its test split, or cross-validated, and everything that it did."""
    response = yield from ask(terms, Request("GET", f"/v1/jobs/{quote(job_id, safe='')}/report"))
    return parse(terms, response, Report)


def files(terms: Terms, job_id: str) -> Flow[list[FileOut]]:
    """What a job published."""
    response = yield from ask(terms, Request("GET", f"/v1/jobs/{quote(job_id, safe='')}/files"))
    return parse(terms, response, FileList).data


def models(terms: Terms) -> Flow[list[ModelOut]]:
    """The installed models."""
    return parse(terms, (yield from ask(terms, Request("GET", "/v1/models"))), ModelList).data

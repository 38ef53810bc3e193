"""OpenAI's `/v1/fine_tuning/jobs`: the same jobs as `/v1/jobs`, as its client knows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.concurrency import run_in_threadpool

from service.errors import (
    Conflict,
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
    UnusableModel,
)
from service.idempotency import Claim
from service.jobs import Job, JobEvent, JobStatus
from service.logs import bind_contextvars
from service.openai import examples, results
from service.openai.examples import TrainingFile
from service.openai.requests import FineTuningRequest
from service.openai.view import FIELDS, Checkpoint, CheckpointPage, EventPage, FineTuningEvent, FineTuningJob, JobPage
from service.records import JOB_ID, check_event_id
from service.routes import events, submitting
from service.routes.authentication import Caller, Reader, Submitter
from service.routes.bodies import read_json
from service.routes.dependencies import IdempotencyKey, Service, TheService, documented
from service.routes.jobs import JobId
from service.routes.openai_files import read_examples

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI"])

ERRORS = documented(InvalidInput, JobNotFound)
BODY = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/FineTuningRequest"}}},
}
METADATA = re.compile(r"metadata\[(.{1,64})\]")
# How OpenAI's streams end.
DONE = format_sse_event(data_str="[DONE]")


@router.post(
    "",
    responses=documented(InvalidInput, UnusableModel, ModelNotFound, Conflict, PayloadTooLarge, UnsupportedMediaType),
    openapi_extra={"requestBody": BODY},
)
async def create_job(
    caller: Submitter,
    request: Request,
    response: Response,
    service: TheService,
    idempotency_key: IdempotencyKey = None,
) -> FineTuningJob:
    """Queue an adaptation to uploaded examples.

    Everything that can be known without the model's weights is checked first, each example too."""
    body = await read_json(request)
    asked = FineTuningRequest.parse_json(body)
    claim = Claim.of(caller.owner, idempotency_key, body) if idempotency_key else None
    size = await run_in_threadpool(_size, service, caller, asked)
    with service.submissions.admit(caller.owner, size) as threads:
        job, created = await to_thread.run_sync(_create, service, caller, asked, claim, limiter=threads)
    bind_contextvars(job_id=job.id)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    return await run_in_threadpool(_show, service, job)


def _size(service: Service, caller: Caller, asked: FineTuningRequest) -> str:
    """How many bytes are to be checked, as a `Content-Length` would say it."""
    ids = [file_id for file_id in (asked.training_file, asked.validation_file) if file_id is not None]
    try:
        return str(sum(service.uploads.get(file_id, caller.sees).bytes for file_id in ids))
    except NotFound:
        return ""  # of a job's own files it is unknown, and what is not there is told when it is read


def _create(service: Service, caller: Caller, asked: FineTuningRequest, claim: Claim | None) -> tuple[Job, bool]:
    if claim and (earlier := service.queue.find_claimed(claim)):
        return earlier, False
    training = _read(service, caller, asked.training_file, "training_file")
    validation = _read(service, caller, asked.validation_file, "validation_file") if asked.validation_file else None
    try:
        spec = asked.spec(training, validation)
        submitting.check(service, spec)
    except InvalidInput as error:
        raise asked.restate(error, training, validation) from None
    return submitting.create(service, caller, spec, claim, asked.record(), asked.warnings())


def _read(service: Service, caller: Caller, file_id: str, param: str) -> TrainingFile:
    try:
        return examples.read(*read_examples(service, caller, file_id), param)
    except NotFound as error:
        raise InvalidInput(f"{error.message}; upload it to /v1/files first", param=param) from None


def _show(service: Service, job: Job) -> FineTuningJob:
    return FineTuningJob.of(job, service.queue.details([job.id], *FIELDS)[0])


@router.get("", responses=documented(InvalidInput))
def list_jobs(
    caller: Reader,
    request: Request,
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=f"^{JOB_ID.pattern}$", description="`last_id` of a page.")] = None,
) -> JobPage:
    """Your jobs, newest first, however they were created; an admin key sees everybody's.

    `metadata[k]=v` lists those alone whose metadata has it."""
    jobs = service.queue.list_jobs(limit + 1, after, caller.sees, _wanted(request))
    records = service.queue.details([job.id for job in jobs], *FIELDS)
    shown = [FineTuningJob.of(job, record) for job, record in zip(jobs, records, strict=True)]
    return JobPage.of(shown, limit)


def _wanted(request: Request) -> Callable[[Job], bool]:
    """Which jobs a request's `metadata` selects; `null` those that have none."""
    if request.query_params.get("metadata") == "null":
        return lambda job: not job.metadata
    asked = [(match[1], value) for name, value in request.query_params.items() if (match := METADATA.fullmatch(name))]
    return lambda job: all(job.metadata.get(key) == value for key, value in asked)


@router.get("/{job_id}", responses=ERRORS)
def get_job(caller: Reader, service: TheService, job_id: JobId) -> FineTuningJob:
    """One job."""
    return _show(service, service.queue.get(job_id, caller.sees))


@router.post("/{job_id}/cancel", responses=documented(InvalidInput, JobNotFound, Conflict))
def cancel_job(caller: Submitter, service: TheService, job_id: JobId) -> FineTuningJob:
    """Stop a job within seconds, whatever it is doing. Nothing of it is published."""
    return _show(service, service.queue.cancel(job_id, caller.sees))


@router.post("/{job_id}/pause", include_in_schema=False)
@router.post("/{job_id}/resume", include_in_schema=False)
def refuse(caller: Submitter, service: TheService, job_id: JobId) -> FineTuningJob:
    """Not offered: a job takes minutes. Cancel it, and create another."""
    service.queue.status(job_id, caller.sees)
    raise InvalidInput("a job is neither paused nor resumed; cancel it, and create another")


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses={
        **ERRORS,
        200: {
            "description": "A list, newest first; or with `stream=true` a stream to the job's end, oldest first.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    },
)
async def list_events(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 20,
    after: Annotated[
        str | None, Query(description="In a list, `last_id` of a page; in a stream, the last seen.")
    ] = None,
    stream: bool = False,
) -> Any:
    """What happened to a job."""
    if after is not None:
        check_event_id(after)
    if stream:
        service.watcher.check_room(caller.owner)
        page = await run_in_threadpool(events.read, service.queue, job_id, after, caller.sees, _as_sent)
        streamed = events.stream(service, job_id, caller, page, _as_sent, DONE)
        return EventSourceResponse(streamed, headers=events.HEADERS)
    newest = reversed(await run_in_threadpool(service.queue.events, job_id, None, caller.sees))
    older = [event for event in newest if after is None or _order(event.id) < _order(after)]
    return EventPage.of([FineTuningEvent.of(event) for event in older[: limit + 1]], limit)


def _as_sent(event: JobEvent) -> bytes:
    return format_sse_event(data_str=FineTuningEvent.of(event).model_dump_json())


def _order(event_id: str) -> tuple[int, int]:
    time, _, number = event_id.partition("-")
    return int(time), int(number)


@router.get("/{job_id}/checkpoints", responses=ERRORS)
def list_checkpoints(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of a page.")] = None,
) -> CheckpointPage:
    """The passes of a job that has succeeded, the last one first, with what came out on the selection split."""
    job = service.queue.get(job_id, caller.sees)
    if job.status is not JobStatus.SUCCEEDED:
        return CheckpointPage.of([], limit)
    record = service.queue.details([job.id], *FIELDS)[0]
    passes = reversed(results.read_passes(service.store, job))
    found = [Checkpoint.of(job, record, one) for one in passes]
    ids = [one.id for one in found]
    start = ids.index(after) + 1 if after in ids else 0
    return CheckpointPage.of(found[start : start + limit + 1], limit)

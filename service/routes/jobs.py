"""Jobs: create, look at, stop, forget."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from service.answers import Estimate, JobList
from service.decomposed import is_decomposed
from service.errors import (
    Conflict,
    InvalidInput,
    JobNotFound,
    ModelNotFound,
    PayloadTooLarge,
    TooManyRequests,
    UnsupportedMediaType,
    UnusableModel,
)
from service.estimates import Loads, Size, estimate
from service.idempotency import Claim
from service.jobs import Job, JobSpec
from service.logs import bind_contextvars
from service.records import check_job_id
from service.routes import submitting
from service.routes.authentication import Caller, Reader, Submitter
from service.routes.bodies import DRAIN_BYTES, read_json
from service.routes.dependencies import IdempotencyKey, Service, TheService, documented
from service.workforce import list_workers

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

LONGEST_WAIT_SECONDS = 60.0


async def _job_id(job_id: Annotated[str, Path(description="As `POST /v1/jobs` returned it.")]) -> str:
    check_job_id(job_id)
    bind_contextvars(job_id=job_id)
    return job_id


JobId = Annotated[str, Depends(_job_id)]


async def _admit(caller: Submitter, request: Request, service: TheService) -> AsyncIterator[CapacityLimiter]:
    """The threads that may check the body; a caller who is refused them still sees why."""
    with ExitStack() as admitted:
        try:
            declared = request.headers.get("content-length", "")
            threads = admitted.enter_context(service.submissions.admit(caller.owner, declared))
        except TooManyRequests:
            await _drain(request)
            raise
        yield threads


async def _drain(request: Request) -> None:
    """Read a body that nobody wants, as far as a client is let send it."""
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > DRAIN_BYTES:
            break


Threads = Annotated[CapacityLimiter, Depends(_admit)]


def body_schema() -> dict[str, Any]:
    """How the body that `create_job` parses itself is documented."""
    return {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }


@router.post(
    "",
    status_code=202,
    response_model=Job,
    responses={
        200: {"model": Estimate, "description": "With `dry_run`: what the job would take. Nothing is queued."},
        **documented(InvalidInput, UnusableModel, ModelNotFound, Conflict, PayloadTooLarge, UnsupportedMediaType),
    },
    openapi_extra={"requestBody": body_schema()},
)
async def create_job(
    caller: Submitter,
    request: Request,
    response: Response,
    service: TheService,
    threads: Threads,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Check the job and tell what it would take; queue nothing.")] = False,
) -> Any:
    """Queue an adaptation. Everything that can be known without the model's weights is checked first.

    With an `Idempotency-Key` that has created a job already, that job comes back, and `Idempotent-Replayed: true`.
    """
    body = await read_json(request)
    if dry_run:
        return JSONResponse((await to_thread.run_sync(_estimate, service, body, limiter=threads)).model_dump())
    claim = Claim.of(caller.owner, idempotency_key, body) if idempotency_key else None
    job, created = await to_thread.run_sync(_create, service, caller, body, claim, limiter=threads)
    bind_contextvars(job_id=job.id)
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


def _estimate(service: Service, body: bytes) -> Estimate:
    spec = JobSpec.parse_json(body)
    model = submitting.check(service, spec)
    speeds = [info.speed for info in list_workers(service.queue.redis) if info.speed is not None]
    return estimate(
        Size.of(model.shapes, model.bytes),
        Loads.of(spec, model),
        spec,
        # The slowest: any of them may take the job.
        speed=min(speeds) * 1e9 if speeds else None,
        decomposed=is_decomposed(service.settings.cache, model.revision),
    )


def _create(service: Service, caller: Caller, body: bytes, claim: Claim | None) -> tuple[Job, bool]:
    """A job, and whether this request created it."""
    if claim and (earlier := service.queue.find_claimed(claim)):
        return earlier, False
    spec = JobSpec.parse_json(body)
    submitting.check(service, spec)
    return submitting.create(service, caller, spec, claim)


@router.get("", responses=documented(InvalidInput))
def list_jobs(
    caller: Reader,
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=r"^job_[0-9a-z]{20}$", description="`next` of a page.")] = None,
) -> JobList:
    """Your jobs, newest first; an admin key sees everybody's."""
    found = service.queue.list_jobs(limit + 1, after, caller.sees)
    page = found[:limit]
    return JobList(data=page, next=page[-1].id if len(found) > limit else None)


@router.get("/{job_id}", responses=documented(InvalidInput, JobNotFound))
async def get_job(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    wait: Annotated[
        float, Query(ge=0, le=LONGEST_WAIT_SECONDS, allow_inf_nan=False, description="Seconds to wait for its end.")
    ] = 0,
) -> Job:
    """One job; with `wait`, as soon as it has ended or after so many seconds."""
    if wait:
        await _await_end(service, job_id, caller, time.monotonic() + wait)
    return await run_in_threadpool(service.queue.get, job_id, caller.sees)


async def _await_end(service: Service, job_id: str, caller: Caller, deadline: float) -> None:
    service.watcher.check_room(caller.owner)
    with service.watcher.watch(job_id, caller.owner) as watch:
        while not service.watcher.stopped and await watch.wait(deadline - time.monotonic()):
            if (await run_in_threadpool(service.queue.status, job_id, caller.sees)).terminal:
                return


@router.post("/{job_id}/cancel", responses=documented(InvalidInput, JobNotFound, Conflict))
def cancel_job(caller: Submitter, service: TheService, job_id: JobId) -> Job:
    """Stop a job within seconds, whatever it is doing. Nothing of it is published."""
    return service.queue.cancel(job_id, caller.sees)


@router.delete("/{job_id}", status_code=204, responses=documented(InvalidInput, JobNotFound, Conflict))
def delete_job(caller: Submitter, service: TheService, job_id: JobId) -> None:
    """Forget a job that has ended, with its examples and artifacts."""
    service.queue.delete(job_id, caller.sees)
    service.store.delete(job_id)
    service.queue.files_deleted(job_id)

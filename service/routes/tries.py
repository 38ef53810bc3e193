"""Tries: what the base and the adapted model of a finished job answer to a prompt."""

from __future__ import annotations

import time
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service import lengths, masks, models
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
from service.jobs import Job, JobStatus
from service.routes.authentication import Caller, Reader, Submitter
from service.routes.bodies import read_json
from service.routes.dependencies import Service, TheService, documented
from service.routes.jobs import LONGEST_WAIT_SECONDS, JobId, Threads
from service.tries.contract import Try, TrySpec


async def _check_on(service: TheService) -> None:
    if not service.settings.tries_in_force:
        raise NotFound("this service answers no tries; its operator can set C2I_TRIES=on")


router = APIRouter(prefix="/v1/jobs/{job_id}/tries", tags=["tries"])
On = Depends(_check_on)

MAX_BODY_BYTES = 1_000_000
BODY = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TrySpec"}}}}


@router.post(
    "",
    status_code=202,
    responses=documented(
        InvalidInput,
        JobNotFound,
        NotFound,
        ModelNotFound,
        UnusableModel,
        Conflict,
        PayloadTooLarge,
        UnsupportedMediaType,
    ),
    openapi_extra={"requestBody": BODY},
)
async def create_try(
    caller: Submitter,
    on: Annotated[None, On],
    request: Request,
    response: Response,
    service: TheService,
    job_id: JobId,
    threads: Threads,
) -> Try:
    """Ask the base and the adapted model of a job that succeeded. A worker answers; the try is kept for an hour."""
    job = await run_in_threadpool(service.queue.get, job_id, caller.sees)
    body = await read_json(request, MAX_BODY_BYTES)
    made = await to_thread.run_sync(_create, service, caller, job, body, limiter=threads)
    response.headers["Location"] = f"/v1/jobs/{job_id}/tries/{made.id}"
    return made


def _create(service: Service, caller: Caller, job: Job, body: bytes) -> Try:
    spec = TrySpec.parse_json(body)
    if job.status is not JobStatus.SUCCEEDED:
        raise Conflict(f"the job is {job.status.value}; only one that succeeded has a model to try")
    model = models.resolve(service.settings.models, job.model)
    if model.masked and model.mask_token is not None:
        masks.check_prompt(spec.prompt, model.mask_token, "prompt")
    lengths.check_prompt(model, spec.prompt, 0 if model.masked else spec.max_tokens)
    made = service.tries.create(job, spec, caller.owner)
    service.wake_answerer()
    return made


@router.get("/{try_id}", responses=documented(InvalidInput, JobNotFound, NotFound))
async def get_try(
    caller: Reader,
    on: Annotated[None, On],
    service: TheService,
    job_id: JobId,
    try_id: str,
    wait: Annotated[
        float,
        Query(ge=0, le=LONGEST_WAIT_SECONDS, allow_inf_nan=False, description="Seconds to wait for a change."),
    ] = 0,
) -> Try:
    """One try; with `wait`, as soon as it changes (it is begun, an answer comes, it ends), or after so many seconds."""
    await run_in_threadpool(service.queue.status, job_id, caller.sees)
    found = await run_in_threadpool(service.tries.get, try_id, job_id)
    deadline = time.monotonic() + wait
    if wait:
        service.watcher.check_room(caller.owner)
        with service.watcher.watch(try_id, caller.owner) as watch:
            before = found
            while not found.ended and found == before and await watch.wait(deadline - time.monotonic()):
                if service.watcher.stopped:
                    break
                found = await run_in_threadpool(service.tries.get, try_id, job_id)
    return found

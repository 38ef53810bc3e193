"""OpenAI's `/v1/files`: what jobs are made of, and what came of them."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterator
from datetime import timedelta
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import Conflict, InvalidInput, JobNotFound, NotFound, PayloadTooLarge, UnsupportedMediaType
from service.jobs import Job, JobStatus
from service.openai import examples, results
from service.openai.view import FileDeleted, FileObject, FilePage, seconds
from service.routes import files
from service.routes.authentication import Caller, Reader, Submitter
from service.routes.bodies import bounded, content_type
from service.routes.dependencies import Service, TheService, documented
from service.routes.jobs import Threads
from service.settings import MAX_BODY_BYTES

router = APIRouter(prefix="/v1/files", tags=["OpenAI"])

ERRORS = documented(InvalidInput, NotFound)
FINE_TUNE, RESULTS = "fine-tune", "fine-tune-results"
# As OpenAI has them.
SHORTEST, LONGEST = timedelta(hours=1), timedelta(days=30)
MAX_FIELDS = 8
# Of the newest jobs that succeeded, the results are listed; those of older ones are named by the jobs themselves.
MAX_LISTED = 100
PRIVATE = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "JSON Lines; a line is an example: `messages`, or `prompt` and `completion`; "
                        "with `choices`, where its answer is one of them.",
                    },
                    "purpose": {"type": "string", "enum": [FINE_TUNE]},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                },
            }
        }
    },
}

FileId = Annotated[str, Path(description="As `POST /v1/files` or a job's `result_files` has it.")]


@router.post(
    "",
    responses=documented(InvalidInput, PayloadTooLarge, UnsupportedMediaType, Conflict),
    openapi_extra={"requestBody": FORM},
)
async def upload_file(caller: Submitter, request: Request, service: TheService, threads: Threads) -> FileObject:
    """Store a file of examples for `training_file` or `validation_file`. Each of its lines is checked."""
    if content_type(request) != "multipart/form-data":
        raise UnsupportedMediaType("the body must be a form, `Content-Type: multipart/form-data`")
    try:
        parser = MultiPartParser(request.headers, _pieces(request), max_files=1, max_fields=MAX_FIELDS)
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidInput(error.message) from None
    try:
        file, lifetime = _read_form(form)
        content = await file.read()
        name = _name(file.filename)
        return await to_thread.run_sync(_store, service, caller, name, content, lifetime, limiter=threads)
    finally:
        await form.close()


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    async for piece in bounded(request, MAX_BODY_BYTES):
        yield piece


def _read_form(form: FormData) -> tuple[UploadFile, timedelta | None]:
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise InvalidInput("a file is needed", param="file")
    if purpose != FINE_TUNE:
        raise InvalidInput(f"`{FINE_TUNE}` is the one purpose that files have here", param="purpose")
    after = form.get("expires_after[seconds]")
    if after is None:
        return file, None
    if not (isinstance(after, str) and after.isascii() and after.isdecimal() and len(after) < 9):
        raise InvalidInput("a whole number", param="expires_after.seconds")
    lifetime = timedelta(seconds=int(after))
    if not SHORTEST <= lifetime <= LONGEST:
        raise InvalidInput("3,600 to 2,592,000", param="expires_after.seconds")
    return file, lifetime


def _name(given: str | None) -> str:
    """What a client calls a file, within bounds; it is shown and never opened."""
    name = "".join(char for char in re.split(r"[/\\]", given or "")[-1] if char.isprintable())
    return name[:255] or "file.jsonl"


def _store(service: Service, caller: Caller, name: str, content: bytes, lifetime: timedelta | None) -> FileObject:
    examples.read(name, content, "file")
    kept = service.settings.job_ttl
    return FileObject.of(service.uploads.put(caller.owner, name, content, min(kept, lifetime or kept)))


@router.get("", responses=documented(InvalidInput))
def list_files(
    caller: Reader,
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Annotated[str | None, Query(max_length=100, description="`last_id` of a page.")] = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str, Query(max_length=100)] = FINE_TUNE,
) -> FilePage:
    """What you uploaded, or with `purpose=fine-tune-results` what came of your jobs; an admin key sees everybody's."""
    found: list[FileObject] = []
    if purpose == FINE_TUNE:
        found = [FileObject.of(upload) for upload in service.uploads.list_files(caller.sees)]
    elif purpose == RESULTS:
        found = list(_results(service, caller))
    if order == "desc":
        found.reverse()
    if after:
        places = [at for at, file in enumerate(found) if file.id == after]
        found = found[places[0] + 1 :] if places else _behind(found, after, order)
    return FilePage.of(found, limit)


def _behind(found: list[FileObject], after: str, order: str) -> list[FileObject]:
    """Where the file that a page ended with is gone: IDs sort by time."""
    return [file for file in found if (file.id > after if order == "asc" else file.id < after)]


def _results(service: Service, caller: Caller) -> Iterator[FileObject]:
    jobs = service.queue.list_jobs(MAX_LISTED, None, caller.sees, lambda job: job.status is JobStatus.SUCCEEDED)
    for job in reversed(jobs):
        for kind in results.kinds_of(job):
            yield _describe(service, caller, job, kind)


@router.get("/{file_id}", responses=ERRORS)
def get_file(caller: Reader, service: TheService, file_id: FileId) -> FileObject:
    """One file."""
    if job_file := results.parse_file_id(file_id):
        job, kind = _job(service, caller, *job_file)
        return _describe(service, caller, job, kind)
    return FileObject.of(service.uploads.get(file_id, caller.sees))


@router.get("/{file_id}/content", response_class=FileResponse, responses=ERRORS)
def get_content(caller: Reader, service: TheService, file_id: FileId) -> Response:
    """What is in a file."""
    if job_file := results.parse_file_id(file_id):
        job, kind = _job(service, caller, *job_file)
        return _content(service, caller, job, kind)
    name = service.uploads.get(file_id, caller.sees).filename
    stream = service.uploads.open(file_id, caller.sees)
    return files.Download(stream, filename=name, media_type="application/jsonl", headers=PRIVATE)


@router.delete("/{file_id}", responses=documented(InvalidInput, NotFound, Conflict))
def delete_file(caller: Submitter, service: TheService, file_id: FileId) -> FileDeleted:
    """Forget an uploaded file; a job has its own copy of it."""
    if job_file := results.parse_file_id(file_id):
        job, _ = _job(service, caller, *job_file)
        raise Conflict(f"it belongs to {job.id} and goes with it: DELETE /v1/jobs/{job.id}", param="file_id")
    service.uploads.delete(file_id, caller.sees)
    return FileDeleted(id=file_id)


def read_examples(service: Service, caller: Caller, file_id: str) -> tuple[str, bytes]:
    """The name and content of a file that a job is made of: an uploaded one, or that of another job.

    Raises:
        NotFound: there is none, or it holds no examples.
    """
    if job_file := results.parse_file_id(file_id):
        job, kind = _job(service, caller, *job_file)
        if kind in results.RESULTS:
            raise NotFound("a file of results holds no examples", param="file_id")
        return results.NAMES[kind], _examples(service, job, kind)
    with service.uploads.open(file_id, caller.sees) as stream:
        return service.uploads.get(file_id, caller.sees).filename, stream.read()


def _job(service: Service, caller: Caller, job_id: str, kind: str) -> tuple[Job, str]:
    """The job that a file belongs to."""
    try:
        job = service.queue.get(job_id, caller.sees)
    except JobNotFound as error:
        raise NotFound(error.message, param="file_id") from None
    if kind in results.RESULTS and job.status is not JobStatus.SUCCEEDED:
        raise NotFound(f"the job is {job.status.value}; only one that succeeded has results", param="file_id")
    return job, kind


def _content(service: Service, caller: Caller, job: Job, kind: str) -> Response:
    if kind == results.ADAPTER:
        return files.get_adapter(caller, service, job.id)
    if kind == results.MODEL:
        return files.get_model(caller, service, job.id)
    if kind == results.REPORT:
        return files.get_report(caller, service, job.id)
    headers = PRIVATE | {"Content-Disposition": f'attachment; filename="{job.id}-{results.NAMES[kind]}"'}
    if kind == results.METRICS:
        return Response(_metrics(service, job), media_type="text/csv; charset=utf-8", headers=headers)
    return Response(_examples(service, job, kind), media_type="application/jsonl", headers=headers)


def _describe(service: Service, caller: Caller, job: Job, kind: str) -> FileObject:
    if kind in (results.ADAPTER, results.MODEL):
        size = files.archive_bytes(service, job, results.NAMES[kind].removesuffix(".zip"))
    elif kind == results.REPORT:
        size = service.store.find(job.id, job.attempt, "report.json").bytes
    else:
        size = len(_metrics(service, job) if kind == results.METRICS else _examples(service, job, kind))
    is_result = kind in results.RESULTS
    return FileObject(
        id=results.file_id(job.id, kind),
        bytes=size,
        created_at=seconds((job.finished_at if is_result else None) or job.created_at),
        filename=results.NAMES[kind],
        purpose="fine-tune-results" if is_result else "fine-tune",
    )


def _metrics(service: Service, job: Job) -> bytes:
    return results.metrics_csv(results.read_passes(service.store, job))


def _examples(service: Service, job: Job, kind: str) -> bytes:
    spec = service.store.get_input(job.id)
    split = spec.examples if kind == results.EXAMPLES else spec.validation
    if split is None:
        raise NotFound("the job came without a validation split", param="file_id")
    return results.jsonl(split, spec.prompt_format)

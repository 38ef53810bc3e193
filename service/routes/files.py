"""What a job published: the report, single files, and archives."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing, suppress
from typing import Annotated, Any, BinaryIO, cast

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from zipstream import ZipStream

from service.answers import FileList, FileOut
from service.errors import Conflict, InvalidInput, JobNotFound, NotFound
from service.goals import Goal
from service.jobs import ArtifactFile, Job, JobStatus
from service.points import point_path
from service.reports import Report
from service.routes.authentication import Caller, Reader
from service.routes.dependencies import Service, TheService, documented
from service.routes.jobs import JobId

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["artifacts"])

ERRORS = documented(InvalidInput, JobNotFound, NotFound, Conflict)
MEDIA_TYPES = {
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".jinja": "text/plain; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

# In every archive.
REPORTS = ("report.html", "report.json")

# `report.html` shows strangers' texts on the API's own origin: there it is to be nobody.
SANDBOX = "sandbox allow-scripts; frame-ancestors 'self'"

IfNoneMatch = Annotated[str | None, Header()]


# In Starlette's 64 kB every piece is a trip to another thread and back: a third of the speed.
PIECE_BYTES = 512 * 1024


class Download(FileResponse):
    """An open file in large pieces."""

    chunk_size = PIECE_BYTES

    def __init__(self, stream: BinaryIO, **more: Any) -> None:
        super().__init__(f"/proc/self/fd/{stream.fileno()}", **more)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)


class Archive(StreamingResponse):
    """An archive of open files. They are closed when it is sent and when its client goes away before that."""

    def __init__(self, archive: ZipStream, opened: ExitStack, headers: dict[str, str]) -> None:
        # The generator too has a file open.
        pieces = opened.enter_context(closing(_in_pieces(archive)))
        super().__init__(pieces, media_type="application/zip", headers=headers)
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:
            await super().__call__(scope, receive, send)


@router.get(
    "/report",
    response_model=Report,
    responses={
        **ERRORS,
        200: {
            "description": "The report; for `Accept: text/html`, a browser's say, `report.html`, which shows it.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        },
    },
)
@router.head("/report", include_in_schema=False)
def get_report(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    if_none_match: IfNoneMatch = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """What was gained, on the test split or cross-validated, what was removed, tried and measured."""
    shown = _prefers_html(accept)
    response = get_file(caller, service, job_id, "report.html" if shown else "report.json", if_none_match)
    response.headers["Vary"] = "Accept"
    if shown and response.status_code == 200:
        response.headers["Content-Disposition"] = "inline"
        response.headers["Content-Security-Policy"] = SANDBOX
    return response


def _prefers_html(accept: str) -> bool:
    """Whether HTML is wanted more than JSON, which is what `*/*` gets (RFC 9110, 12.5.1)."""
    qualities: dict[str, float] = {}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((given.removeprefix("q=") for given in parameters if given.startswith("q=")), "1")
        with suppress(ValueError):
            qualities[kind] = float(quality)

    def quality_of(kind: str) -> float:
        matching = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        return next((qualities[name] for name in matching if name in qualities), 0.0)

    return quality_of("text/html") > quality_of("application/json")


@router.get("/files", responses=ERRORS)
def list_files(caller: Reader, service: TheService, job_id: JobId) -> FileList:
    """Every published file with its size and sha256."""
    files = service.store.files(job_id, _finished(caller, service, job_id).attempt)
    return FileList(data=[FileOut(**file.model_dump(), url=f"/v1/jobs/{job_id}/files/{file.path}") for file in files])


@router.get("/files/{path:path}", response_class=FileResponse, responses=ERRORS)
@router.head("/files/{path:path}", include_in_schema=False)
def get_file(
    caller: Reader, service: TheService, job_id: JobId, path: str, if_none_match: IfNoneMatch = None
) -> Response:
    """One file. `ETag` is its sha256; ranges, `If-Range` and `If-None-Match` are honoured."""
    file = service.store.find(job_id, _finished(caller, service, job_id).attempt, path)
    headers = {"ETag": f'"{file.sha256}"', "Cache-Control": "private, no-cache"}
    if _matches(if_none_match, file.sha256):
        return Response(status_code=304, headers=headers)
    name = file.path.rpartition("/")[2]
    suffix = name[name.rfind(".") :] if "." in name else ""
    return Download(
        service.store.open(file),
        filename=name,
        media_type=MEDIA_TYPES.get(suffix, "application/octet-stream"),
        headers=headers | {"X-Content-Type-Options": "nosniff"},
    )


@router.get("/adapter.zip", response_class=StreamingResponse, responses=ERRORS)
@router.head("/adapter.zip", include_in_schema=False)
def get_adapter(caller: Reader, service: TheService, job_id: JobId, if_none_match: IfNoneMatch = None) -> Response:
    """The adapter's folder in PEFT's format, with the report."""
    return _archive(service, _finished(caller, service, job_id), "adapter", "adapter/", if_none_match)


@router.get("/model.zip", response_class=StreamingResponse, responses=ERRORS)
@router.head("/model.zip", include_in_schema=False)
def get_model(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    if_none_match: IfNoneMatch = None,
    point: Annotated[
        int | None, Query(ge=1, description="Of `compress`: the round whose model is wanted; the last by default.")
    ] = None,
) -> Response:
    """The whole adapted checkpoint, as `from_pretrained` loads it, with the report."""
    job = _finished(caller, service, job_id)
    if point is None:
        return _archive(service, job, "model", "model/", if_none_match)
    path = point_path([file.path for file in service.store.files(job.id, job.attempt)], point)
    return _archive(service, job, f"point-{point}", path, if_none_match)


@router.get("/quantized.zip", response_class=StreamingResponse, responses=ERRORS)
@router.head("/quantized.zip", include_in_schema=False)
def get_quantized(caller: Reader, service: TheService, job_id: JobId, if_none_match: IfNoneMatch = None) -> Response:
    """The checkpoint in fewer bits, of a job that asked for it, with the report."""
    return _archive(service, _finished(caller, service, job_id), "quantized", "quantized/", if_none_match)


@router.get("/factored.zip", response_class=StreamingResponse, responses=ERRORS)
@router.head("/factored.zip", include_in_schema=False)
def get_factored(caller: Reader, service: TheService, job_id: JobId, if_none_match: IfNoneMatch = None) -> Response:
    """The checkpoint with weights of low rank as two factors and what loads it, with the report. Few jobs have one:
    `factored` of the report says so."""
    return _archive(service, _finished(caller, service, job_id), "factored", "factored/", if_none_match)


def _finished(caller: Caller, service: Service, job_id: str) -> Job:
    job = service.queue.get(job_id, caller.sees)
    if job.status is not JobStatus.SUCCEEDED:
        raise Conflict(f"the job is {job.status.value}; only one that succeeded has artifacts")
    return job


def _archive(service: Service, job: Job, name: str, folder: str, if_none_match: str | None) -> Response:
    """A zip made while it is sent: nothing is written to disk and its exact length is known before the first byte.

    Its members are stored and not deflated: weights do not shrink, and stored members have a known length.
    """
    files = _members(service, job, folder)
    digest = hashlib.sha256("\n".join(f"{file.sha256} {file.path}" for file in files).encode()).hexdigest()
    name = f"{job.id}-{name}"
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, no-cache"}
    if _matches(if_none_match, digest):
        return Response(status_code=304, headers=headers)
    with ExitStack() as stack:
        archive = _zip(service, files, name, folder, stack)
        headers |= {"Content-Length": str(len(archive)), "Content-Disposition": f'attachment; filename="{name}.zip"'}
        return Archive(archive, stack.pop_all(), headers)


def archive_bytes(service: Service, job: Job, folder: str) -> int:
    """How long the archive of a folder is.

    Raises:
        NotFound: the job published no such folder.
    """
    with ExitStack() as stack:
        files = _members(service, job, f"{folder}/")
        return len(_zip(service, files, f"{job.id}-{folder}", f"{folder}/", stack))


def _members(service: Service, job: Job, folder: str) -> list[ArtifactFile]:
    there = service.store.files(job.id, job.attempt)
    if not any(file.path.startswith(folder) for file in there):
        if folder == "factored/":
            raise NotFound(
                "the job's weights keep too many components for two factors to save anything; take model.zip"
            )
        if job.goal is Goal.COMPRESS and folder == "adapter/":
            raise NotFound(
                "a compressed model has no adapter: no small LoRA takes whole structures out of a model; take model.zip"
            )
        raise NotFound(f"the job published no {folder.rstrip('/')}")
    return [file for file in there if file.path.startswith(folder) or file.path in REPORTS]


def _zip(service: Service, files: Iterable[ArtifactFile], name: str, folder: str, opened: ExitStack) -> ZipStream:
    """A point's model stands in `model/`, as the last does. All are opened at once: what is open stays whole if the
    job is deleted while it is sent."""
    archive = ZipStream(sized=True)
    for file in files:
        stream = opened.enter_context(service.store.open(file))
        path = file.path.removeprefix(folder.rpartition("model/")[0])  # `points/2/` of a point, nothing of the others
        archive.add_path(f"/proc/self/fd/{stream.fileno()}", arcname=f"{name}/{path}")
    return archive


def _in_pieces(archive: ZipStream) -> Generator[bytes, None, None]:
    piece = bytearray()
    with closing(cast(Generator[bytes, None, None], iter(archive))) as chunks:
        for chunk in chunks:
            piece += chunk
            if len(piece) >= PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
    yield bytes(piece)


def _matches(if_none_match: str | None, etag: str) -> bool:
    tags = (tag.strip().removeprefix("W/").strip('"') for tag in (if_none_match or "").split(","))
    return any(tag in ("*", etag) for tag in tags)

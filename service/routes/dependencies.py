"""What routes are given, the errors they document, and how errors become bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Header, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BaseModel
from pydantic_core import PydanticCustomError
from redis import Redis
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from service import idempotency
from service.answers import ErrorDetail
from service.artifacts import ArtifactStore, disk_is_full
from service.errors import (
    C2IError,
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Unavailable,
    UnsupportedMediaType,
)
from service.jobs import field_path
from service.keys import KeyStore
from service.limits import Rates, Submissions
from service.metrics import Metrics
from service.queue import JobQueue
from service.settings import MAX_BODY_BYTES, Settings
from service.tries.queue import TryQueue
from service.uploads import Uploads
from service.watching import Watcher


@dataclass(frozen=True)
class Service:
    """What every route works with."""

    settings: Settings
    queue: JobQueue
    probe: Redis
    """The same Redis, asked without patience."""
    store: ArtifactStore
    metrics: Metrics
    keys: KeyStore
    rates: Rates
    """Requests of each caller."""
    submissions: Submissions
    """Bodies that are being checked."""
    watcher: Watcher
    tries: TryQueue
    wake_answerer: Callable[[], None]
    """Called when a try waits."""

    @property
    def uploads(self) -> Uploads:
        """Files that jobs are made of."""
        return Uploads(self.store)


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


TheService = Annotated[Service, Depends(_service)]


def _check_idempotency_key(key: str | None) -> str | None:
    if key is not None and not idempotency.FORM.fullmatch(key):
        raise PydanticCustomError("idempotency_key", "1 to 255 visible ASCII characters, a UUID for example")
    return key


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias=idempotency.NAME,
        description="The same key and body within 24 hours: the same job, not a second one. A UUID for example.",
        json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    ),
    AfterValidator(_check_idempotency_key),
]


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def documented(*errors: type[C2IError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can end in these errors."""
    by_status: dict[int | str, dict[str, Any]] = {}
    everywhere: tuple[type[C2IError], ...] = (Unavailable, InternalError)
    for error in errors + everywhere:
        summary = f"`{error.code}`: {(error.__doc__ or '').splitlines()[0]}"
        entry = by_status.setdefault(error.status, {"model": ErrorBody, "description": ""})
        entry["description"] = f"{entry['description']}\n\n{summary}".strip()
    return by_status


def translate(error: Exception) -> C2IError:
    """Any exception as one of ours. What nobody foresaw is an internal error that says nothing of itself."""
    if isinstance(error, C2IError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid_parameter(error)
    if isinstance(error, HTTPException):
        return _http_error(error)
    if isinstance(error, RedisError):
        return Unavailable("Redis does not answer; try again in a few seconds")
    if disk_is_full(error):
        return Unavailable("the server's disk is full")
    return InternalError("an internal error; the server's log has the details")


def _invalid_parameter(error: RequestValidationError) -> InvalidInput:
    first = error.errors()[0]
    # ("query", "wait") and ("path", "job_id"): clients know the name alone.
    return InvalidInput(first["msg"], param=field_path(first["loc"][1:]) or None)


def _http_error(error: HTTPException) -> C2IError:
    match error.status_code:
        case 404:
            return NotFound("no such route; /docs lists them all")
        case 405:
            return MethodNotAllowed("this route has no such method; /docs lists them all")
        case 413:
            return PayloadTooLarge(f"the body is over {MAX_BODY_BYTES:,} bytes")
        case 415:
            return UnsupportedMediaType("the body must be JSON with `Content-Type: application/json`")
        case status if status < 500:
            return InvalidInput(str(error.detail))
        case _:
            return InternalError("an internal error; the server's log has the details")

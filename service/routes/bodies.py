"""A request's body, read within bounds."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request

from service.errors import PayloadTooLarge, UnsupportedMediaType
from service.settings import MAX_BODY_BYTES

DRAIN_BYTES = 4 * MAX_BODY_BYTES


async def read_json(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """A body of JSON as it came.

    Raises:
        UnsupportedMediaType: it is called something else.
        PayloadTooLarge: it is over `most` bytes.
    """
    if content_type(request) != "application/json":
        raise UnsupportedMediaType("the body must be JSON with `Content-Type: application/json`")
    body = bytearray()
    async for chunk in bounded(request, most):
        body += chunk
    return bytes(body)


def content_type(request: Request) -> str:
    """`application/json`, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body's pieces, declared or chunked. (FastAPI's `max_body_size` answers in plain text; errors here have one
    shape.)

    What is too long is still read up to `DRAIN_BYTES`: a client that is cut off while it sends does not see why.

    Raises:
        PayloadTooLarge: behind the pieces that are within `most` bytes.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > DRAIN_BYTES:
        raise _too_large(most)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > DRAIN_BYTES:
            break
        if received <= most:
            yield chunk
    if received > most:
        raise _too_large(most)


def _too_large(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is over {most:,} bytes; send less: fewer or shorter examples, a shorter prompt")

"""Errors on the routes that OpenAI's client knows, as it knows them: 400 for what is wrong in a request, and a `type`.

The client makes an exception class of the status, and sends a request again on 409 and 500 unless it is told not to.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request

from service.errors import C2IError, InvalidInput

PATHS = ("/v1/files", "/v1/fine_tuning/")
INVALID = str(InvalidInput.status)


def speaks(path: str) -> bool:
    """Whether a path is one of these routes'."""
    return path.startswith(PATHS)


def restate(request: Request, error: C2IError, body: dict[str, Any], headers: dict[str, str]) -> int:
    """The status that an error is sent with; on these routes with more in its body and headers."""
    if not speaks(request.url.path):
        return error.status
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body["error"]["type"] = "rate_limit_error" if error.status == 429 else kind
    headers["X-Should-Retry"] = str(error.retryable).lower()
    return 400 if isinstance(error, InvalidInput) else error.status


def document(schema: dict[str, Any]) -> None:
    """Make an OpenAPI document say 400 where these routes do."""
    for path, operations in schema["paths"].items():
        if speaks(path):
            for operation in operations.values():
                responses = operation["responses"]
                if INVALID in responses:
                    responses["400"] = responses.pop(INVALID)

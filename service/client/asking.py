"""One request, asked for again where the service is busy or away; its errors come out as the exceptions they were."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.client.steps import Flow, Pause, Request, open_, send
from service.errors import C2IError, InternalError, InvalidInput, TooManyRequests, Unavailable

M = TypeVar("M", bound=BaseModel)

BUSY = (TooManyRequests.status, Unavailable.status)
DEFAULT_URL = "http://127.0.0.1:8000"
PATIENCE_SECONDS = 30.0
# A long poll of a minute is silent for that long; a stream's heartbeat comes every 15 s.
TIMEOUT = httpx.Timeout(30, read=90)
# Between two tries where nobody is there who could say `Retry-After`.
RETRY_SECONDS = 0.5


@dataclass
class Terms:
    """How a client deals with its service.

    Args:
        url: where it is; C2I_URL, else http://127.0.0.1:8000, if not given.
        key: an API key; C2I_KEY, if not given.
        patience: seconds for which a call is repeated, in all, while the service is busy (429), away (503) or not
            there. When it says at what time to come again (`Retry-After`), that is kept to.
        expect_running: a service that was never there is an error at once, and is not waited for.

    Raises:
        InvalidInput: naming `url` or the key that is none.
    """

    url: str
    patience: float
    expect_running: bool
    reached: bool = False
    """Whether it has ever answered."""

    @classmethod
    def of(cls, url: str | None, patience: float, expect_running: bool) -> Self:
        """The terms of a client's arguments."""
        return cls(url or os.environ.get("C2I_URL", "").strip() or DEFAULT_URL, patience, expect_running)

    @property
    def waits(self) -> bool:
        """Whether a service that is not there may come."""
        return self.reached or not self.expect_running

    def unreachable(self, error: httpx.TransportError) -> Unavailable:
        """The error of a service that does not answer."""
        reason = "does not answer in time" if isinstance(error, httpx.TimeoutException) else "is not reachable"
        return Unavailable(f"{self.url} {reason}")


def http_options(terms: Terms, key: str | None) -> dict[str, Any]:
    """What both of httpx's clients are made with.

    Raises:
        InvalidInput: naming the URL or the key.
    """
    return {
        "base_url": _checked_url(terms.url),
        "headers": {"Authorization": f"Bearer {checked}"} if (checked := _checked_key(key)) else {},
        "timeout": TIMEOUT,
        "follow_redirects": False,  # the key would go with it
    }


def http_request(http: httpx.Client | httpx.AsyncClient, request: Request) -> httpx.Request:
    """A request as httpx has it."""
    return http.build_request(
        request.method, request.path, params=request.params, headers=request.headers, content=request.content
    )


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise InvalidInput("no URL of a service; one is like http://127.0.0.1:8000", param="url")
    return url


def _checked_key(given: str | None) -> str:
    key = (os.environ.get("C2I_KEY", "") if given is None else given).strip()
    if not (key.isascii() and key.isprintable()):
        param = "C2I_KEY" if given is None else "key"
        raise InvalidInput("not a key; it is like c2i_ and 43 letters and digits", param=param)
    return key


def ask(terms: Terms, request: Request, *, done_if: type[C2IError] | None = None) -> Flow[httpx.Response]:
    """The whole answer.

    Args:
        done_if: the error that says of a repeated request that the first one, whose answer was lost, did its work.
            It is the answer then.

    Raises:
        C2IError: what the service says; `Unavailable` where it says nothing.
    """
    return (yield from _ask(terms, request, send, done_if))


def open_stream(terms: Terms, request: Request) -> Flow[httpx.Response]:
    """The same for an answer that is then read piece by piece."""
    return (yield from _ask(terms, request, open_, None))


def _ask(
    terms: Terms,
    request: Request,
    step: Callable[[Request], Flow[httpx.Response]],
    done_if: type[C2IError] | None,
) -> Flow[httpx.Response]:
    # Whatever is asked may be asked twice: reads, cancel and delete by nature, a submission by its Idempotency-Key.
    deadline = time.monotonic() + terms.patience
    lost = False
    while True:
        try:
            response = yield from step(request)
        except httpx.TransportError as error:
            failure: C2IError = terms.unreachable(error)
            pause = RETRY_SECONDS
            hopeless = not terms.waits
            lost = lost or not isinstance(error, httpx.ConnectError)
        else:
            terms.reached = True
            if response.is_success:
                return response
            failure = refusal(response)
            if lost and done_if and isinstance(failure, done_if):
                return response
            pause = failure.retry_after
            hopeless = response.status_code not in BUSY
        if hopeless or time.monotonic() + pause > deadline:
            raise failure
        yield Pause(pause)


def parse(terms: Terms, response: httpx.Response, model: type[M]) -> M:
    """An answer's body. Fields that a newer service has are passed over.

    Raises:
        InternalError: it is nothing that this service says.
    """
    try:
        return model.model_validate_json(response.content, extra="ignore")
    except ValidationError:
        raise InternalError(f"{terms.url} does not answer as this service does") from None


def refusal(response: httpx.Response) -> C2IError:
    """The exception that the service raised, with its `Retry-After`."""
    try:
        body = response.json()["error"]
        kind, message, param = kinds().get(body["code"], C2IError), str(body["message"]), body["param"]
    except (ValueError, KeyError, TypeError):
        known = response.status_code in BUSY  # a proxy's
        kind, param = (Unavailable if known else InternalError), None
        message = f"the service's address answers {response.status_code}, and not as this service does"
    error = kind.__new__(kind)  # their constructors differ
    C2IError.__init__(error, message, param=param)
    after = response.headers.get("retry-after", "")
    if after.isdecimal():
        error.retry_after = int(after)
    return error


def kinds() -> dict[str, type[C2IError]]:
    """Every error by its code; the root has that of an internal error."""
    found: dict[str, type[C2IError]] = {}
    todo: list[type[C2IError]] = [C2IError]
    while todo:
        kind = todo.pop()
        if kind is not C2IError:
            found.setdefault(kind.code, kind)
        todo += kind.__subclasses__()
    return found

"""A line and two measurements for each request, and an ID that the client may give and always gets.

Pure ASGI: Starlette's own base class for middleware would cost each request ten times as much and break streams.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.keys import PREFIX
from service.logs import bind_contextvars, clear_contextvars, named

logger = named(__name__)

HEADER = "X-Request-Id"
# No API key: it would be in the log.
REQUEST_ID = re.compile(rf"(?!{PREFIX})[A-Za-z0-9._-]{{1,64}}")
# Asked by machines every few seconds.
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
UNMATCHED = "unmatched"
# As proxies log a client that left before there was an answer.
ABANDONED = 499

Respond = Callable[[Request, Exception], Response]


class Requests:
    """What this process answered, for `/metrics`."""

    def __init__(self) -> None:
        labels = ("method", "route", "status")
        self.seconds = Histogram(
            "c2i_http_request_seconds",
            "Time from a request's first byte to its answer's last, long polls and streams included.",
            labels,
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 60),
            registry=None,
        )
        self.sent = Counter("c2i_http_sent_bytes", "Bytes of answers' bodies.", ("route",), registry=None)


class Access:
    """The outermost layer of the API."""

    def __init__(self, app: ASGIApp, requests: Requests, respond: Respond) -> None:
        """
        Args:
            respond: the answer to an error that nothing below had one for.
        """
        self._app = app
        self._requests = requests
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, watch its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        clear_contextvars()
        bind_contextvars(request_id=request_id)
        status, sent = ABANDONED, 0

        async def watch(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append(HEADER, request_id)
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            pass
        except Exception as error:
            if status != ABANDONED:
                raise  # the server says so and closes the connection: the client sees that the answer is not whole
            await self._respond(Request(scope), error)(scope, receive, watch)
        finally:
            self._note(scope, status, sent, time.perf_counter() - began)

    def _note(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        route = _template(scope)
        method = scope["method"] if route != UNMATCHED else "any"
        self._requests.seconds.labels(method, route, str(status)).observe(seconds)
        self._requests.sent.labels(route).inc(sent)
        write = logger.debug if route in PROBES and status < 500 else logger.info
        write("request", method=method, route=route, status=status, seconds=round(seconds, 4), bytes=sent)


def _template(scope: Scope) -> str:
    """`/v1/jobs/{job_id}`: never the path itself, which is whatever a client wrote."""
    route = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else UNMATCHED

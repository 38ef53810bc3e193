"""`Client`: the operations with a blocking httpx client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import httpx

from service.client import operations
from service.client.asking import PATIENCE_SECONDS, Terms, http_options, http_request
from service.client.downloading import download
from service.client.steps import Answer, Emit, Flow, Open, Pause, Read, Send, Step, Stream, Work

P = ParamSpec("P")
T = TypeVar("T")


class _Exchange:
    """Takes the steps of one operation; closes what it has opened."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._opened: httpx.Response | None = None
        self._pieces: Iterator[bytes] = iter(())

    def take(self, step: Step) -> Answer:
        try:
            return Answer(self._take(step))
        except httpx.TransportError as error:
            return Answer(error=error)

    def _take(self, step: Step) -> Any:
        match step:
            case Send(request):
                return self._http.send(http_request(self._http, request))
            case Open(request):
                self.close()
                self._opened = self._http.send(http_request(self._http, request), stream=True)
                if self._opened.is_error:
                    self._opened.read()
                self._pieces = self._opened.iter_bytes()
                return self._opened
            case Read():
                return next(self._pieces, b"")
            case Pause(seconds):
                return time.sleep(seconds)
            case Work(do):
                return do()

    def close(self) -> None:
        if self._opened:
            self._opened.close()


def _call(operation: Callable[Concatenate[Terms, P], Flow[T]]) -> Callable[Concatenate[Client, P], T]:
    @wraps(operation)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        flow, answer, exchange = operation(self.terms, *args, **kwargs), Answer(), _Exchange(self.http)
        try:
            while True:
                answer = exchange.take(answer.into(flow))
        except StopIteration as end:
            return cast(T, end.value)
        finally:
            exchange.close()

    return call


def _iterate(operation: Callable[Concatenate[Terms, P], Stream[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @wraps(operation)
    def iterate(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        flow, answer, exchange = operation(self.terms, *args, **kwargs), Answer(), _Exchange(self.http)
        try:
            while True:
                step = answer.into(flow)
                if isinstance(step, Emit):
                    yield step.value
                    answer = Answer()
                else:
                    answer = exchange.take(step)
        except StopIteration:
            return
        finally:
            exchange.close()

    return iterate


class Client:
    """One service at one URL, for one thread at a time. A context manager."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
        expect_running: bool = False,
    ) -> None:
        self.terms = Terms.of(url, patience, expect_running)
        self.http = httpx.Client(**http_options(self.terms, key))

    __init__.__doc__ = Terms.__doc__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up its connections."""
        self.http.close()

    submit = _call(operations.submit)
    estimate = _call(operations.estimate)
    get = _call(operations.get)
    wait = _call(operations.wait)
    events = _iterate(operations.events)
    cancel = _call(operations.cancel)
    delete = _call(operations.delete)
    jobs = _iterate(operations.jobs)
    report = _call(operations.report)
    files = _call(operations.files)
    download = _call(download)
    models = _call(operations.models)

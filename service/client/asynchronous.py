"""`AsyncClient`: the operations with an asynchronous httpx client, on asyncio or trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import anyio
import anyio.to_thread
import httpx

from service.client import operations
from service.client.asking import PATIENCE_SECONDS, Terms, http_options, http_request
from service.client.downloading import download
from service.client.steps import Answer, Emit, Flow, Open, Pause, Read, Send, Step, Stream, Work

P = ParamSpec("P")
T = TypeVar("T")


class _Exchange:
    """Takes the steps of one operation; closes what it has opened."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._opened: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes] | None = None

    async def take(self, step: Step) -> Answer:
        try:
            return Answer(await self._take(step))
        except httpx.TransportError as error:
            return Answer(error=error)

    async def _take(self, step: Step) -> Any:
        match step:
            case Send(request):
                return await self._http.send(http_request(self._http, request))
            case Open(request):
                await self.close()
                self._opened = await self._http.send(http_request(self._http, request), stream=True)
                if self._opened.is_error:
                    await self._opened.aread()
                self._pieces = self._opened.aiter_bytes()
                return self._opened
            case Read():
                return await anext(self._pieces, b"") if self._pieces else b""
            case Pause(seconds):
                return await anyio.sleep(seconds)
            case Work(do):
                return await anyio.to_thread.run_sync(do)

    async def close(self) -> None:
        if self._opened:
            with anyio.CancelScope(shield=True):
                await self._opened.aclose()


def _call(
    operation: Callable[Concatenate[Terms, P], Flow[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @wraps(operation)
    async def call(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        flow, answer, exchange = operation(self.terms, *args, **kwargs), Answer(), _Exchange(self.http)
        try:
            while True:
                answer = await exchange.take(answer.into(flow))
        except StopIteration as end:
            return cast(T, end.value)
        finally:
            await exchange.close()

    return call


def _iterate(
    operation: Callable[Concatenate[Terms, P], Stream[T]],
) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @wraps(operation)
    async def iterate(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        flow, answer, exchange = operation(self.terms, *args, **kwargs), Answer(), _Exchange(self.http)
        try:
            while True:
                step = answer.into(flow)
                if isinstance(step, Emit):
                    yield step.value
                    answer = Answer()
                else:
                    answer = await exchange.take(step)
        except StopIteration:
            return
        finally:
            await exchange.close()

    return iterate


class AsyncClient:
    """`Client` for `async with` and `await`."""

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        patience: float = PATIENCE_SECONDS,
        expect_running: bool = False,
    ) -> None:
        self.terms = Terms.of(url, patience, expect_running)
        self.http = httpx.AsyncClient(**http_options(self.terms, key))

    __init__.__doc__ = Terms.__doc__

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give up its connections."""
        await self.http.aclose()

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

"""What an operation asks of the world, one step at a time: neither a socket nor a clock is touched here.

An operation of the client is a generator (a `Flow`): it yields steps, is sent what came of each, and returns its
result; httpx's failures are thrown into it. So retries, resuming and checking are written once, and a blocking or an
asynchronous httpx client takes the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import httpx

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """An HTTP request, its path from the service's root."""

    method: str
    path: str
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


@dataclass(frozen=True)
class Send:
    """A request and its whole answer."""

    request: Request


@dataclass(frozen=True)
class Open:
    """A request and the head of its answer, an error's body too. What was open before is closed."""

    request: Request


@dataclass(frozen=True)
class Read:
    """The next bytes of what is open, as they come; none at its end."""


@dataclass(frozen=True)
class Pause:
    """Some seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """What would hold up an event loop: the hash of a large file."""

    do: Callable[[], Any]


@dataclass(frozen=True)
class Emit(Generic[T]):
    """Something for the caller, while the operation goes on."""

    value: T


Step = Send | Open | Read | Pause | Work
Flow = Generator[Step, Any, T]
Stream = Generator[Step | Emit[T], Any, None]


@dataclass
class Answer:
    """What came of a step: a value, or an exception for the operation to deal with."""

    value: Any = None
    error: Exception | None = None

    def into(self, flow: Generator[S, Any, Any]) -> S:
        """The operation's next step.

        Raises:
            StopIteration: its result is there.
        """
        return flow.throw(self.error) if self.error else flow.send(self.value)


def send(request: Request) -> Flow[httpx.Response]:
    """Take the step."""
    return cast(httpx.Response, (yield Send(request)))


def open_(request: Request) -> Flow[httpx.Response]:
    """Take the step."""
    return cast(httpx.Response, (yield Open(request)))


def read() -> Flow[bytes]:
    """Take the step."""
    return cast(bytes, (yield Read()))


def work(do: Callable[[], T]) -> Flow[T]:
    """Take the step."""
    return cast(T, (yield Work(do)))

"""What happened to a job: a list, or a stream of Server-Sent Events where the client accepts one.

https://html.spec.whatwg.org/multipage/server-sent-events.html. An event's `id` is that of the list, so a client that
was cut off goes on behind the last one it has (`Last-Event-ID`, which browsers send by themselves, or `after`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool

from service.errors import InvalidInput, JobNotFound
from service.jobs import JobEvent
from service.queue import JobQueue
from service.records import check_event_id
from service.routes.authentication import Caller, Reader
from service.routes.dependencies import Service, TheService, documented
from service.routes.jobs import JobId

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])

# Proxies cut off a connection that is silent for a minute or so; the standard's own advice is 15 s.
HEARTBEAT_SECONDS = 15.0
# When to look again where Redis did not answer although it is subscribed to.
RETRY_SECONDS = 1.0
# Then a listener has to come again, and its key is asked for: one that was revoked meanwhile hears no more.
LONGEST_STREAM_SECONDS = 600.0


class EventList(BaseModel):
    """A job's events, oldest first."""

    data: list[JobEvent]


Form = Callable[[JobEvent], bytes]
HEADERS = {"Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Page:
    """The events behind one that a listener has, as they go over the wire."""

    text: bytes
    last: str | None
    """Where the next page begins."""
    ended: bool
    """Whether no event comes any more."""


@router.get(
    "/events",
    response_model=EventList,
    responses={
        **documented(InvalidInput, JobNotFound),
        200: {
            "description": "A list; or, for `Accept: text/event-stream`, a stream to the job's end, a `JobEvent` each "
            "`data`, its `kind` as `event`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "To a stream: the job has ended and there is nothing behind `Last-Event-ID`."},
    },
)
async def get_events(
    caller: Reader,
    service: TheService,
    job_id: JobId,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    after: Annotated[str | None, Query(description="`id` of the last event that you have.")] = None,
    last_event_id: Annotated[str | None, Header(description="The same; it goes before `after`.")] = None,
) -> Any:
    """What happened to the job so far, or from then on, too."""
    if after is not None:
        check_event_id(after)
    if last_event_id:
        check_event_id(last_event_id, param="Last-Event-ID")
    after = last_event_id or after
    if not _wants_stream(accept):
        return EventList(data=await run_in_threadpool(service.queue.events, job_id, after, caller.sees))
    service.watcher.check_room(caller.owner)
    page = await run_in_threadpool(read, service.queue, job_id, after, caller.sees, as_sent)
    if page.ended and not page.text:
        return Response(status_code=204)  # a browser would connect again for ever
    return EventSourceResponse(stream(service, job_id, caller, page, as_sent), headers=HEADERS)


def _wants_stream(accept: str) -> bool:
    """Whether a stream is named, and JSON not before it."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    if "text/event-stream" not in kinds:
        return False
    return "application/json" not in kinds[: kinds.index("text/event-stream")]


def as_sent(event: JobEvent) -> bytes:
    """An event on these routes' streams."""
    return format_sse_event(data_str=event.model_dump_json(), event=event.kind, id=event.id)


def read(queue: JobQueue, job_id: str, after: str | None, owner: str | None, form: Form) -> Page:
    """The events behind one, each in a form."""
    status, events = queue.history(job_id, after, owner)
    text = b"".join(map(form, events))
    ended = status.terminal or any(event.status.terminal for event in events[-1:])
    return Page(text, events[-1].id if events else after, ended)


async def stream(
    service: Service, job_id: str, caller: Caller, page: Page, form: Form, last: bytes = b""
) -> AsyncIterator[bytes]:
    """Pages to the job's end, and `last` behind them. A listener that reads slowly holds up itself alone: its events
    wait in Redis."""
    if page.text:
        yield page.text
    watcher, until = service.watcher, time.monotonic() + LONGEST_STREAM_SECONDS
    with watcher.watch(job_id, caller.owner) as watch:
        while not page.ended and time.monotonic() < until:
            if not await watch.wait(HEARTBEAT_SECONDS):
                yield KEEPALIVE_COMMENT
                continue
            if watcher.stopped:
                return
            try:
                look = partial(read, service.queue, job_id, page.last, caller.sees, form)
                page = await watcher.share((job_id, page.last, caller.sees, form), look)
            except JobNotFound:
                return  # deleted
            except RedisError:
                asyncio.get_running_loop().call_later(RETRY_SECONDS, watch.wake)
                continue
            if page.text:
                yield page.text
    if page.ended and last:
        yield last

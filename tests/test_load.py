"""What measures the service's speed measures what it says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.load.generators import at_rate

STALL_SECONDS = 0.6


@pytest.fixture
def stalling() -> Iterator[str]:
    """A server that answers at once, but for one stall in which it answers nobody."""
    ready, over = threading.Event(), asyncio.Event()
    url: list[str] = []
    answered = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            answered += 1
            if answered == 50:
                threading.Event().wait(STALL_SECONDS)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()
        async with server:
            await over.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait(10)
    yield url[0]
    loop.call_soon_threadsafe(over.set)
    thread.join()
    loop.close()


def test_a_stall_is_charged_to_everyone_who_came_meanwhile(stalling: str) -> None:
    rate = at_rate(stalling, per_second=200, seconds=2)
    assert rate.failed == 0
    # 120 of 400 requests were due while it stood still: who asks again only once it is answered sees one of them.
    assert rate.p99 > 0.8 * STALL_SECONDS * 1e3
    assert rate.p50 < 0.5 * STALL_SECONDS * 1e3

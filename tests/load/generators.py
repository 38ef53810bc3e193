"""Load: wrk as fast as it gets answers, requests at a fixed rate, downloads, listeners."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent
CONNECTIONS = 16


@dataclass(frozen=True)
class Rate:
    """Answers a second, and how long they took, in milliseconds."""

    answers: int
    per_second: float
    p50: float
    p99: float
    longest: float
    failed: int


def wrk(url: str, seconds: float, *script: str) -> Rate:
    """As many requests as are answered on 16 connections, one at a time on each.

    Args:
        script: a Lua file of this folder and its arguments.
    """
    name, *arguments = script or ("done.lua",)
    load = ["-t", "1", "-c", str(CONNECTIONS), "-d", f"{math.ceil(seconds)}s", "--timeout", "30s", "-s", name]
    command = ["wrk", *load, url, "--", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE).stdout
    found = json.loads(output.splitlines()[-1])
    return Rate(
        answers=found["requests"],
        per_second=(found["requests"] - found["failed"]) / found["microseconds"] * 1e6,
        p50=found["p50"] / 1e3,
        p99=found["p99"] / 1e3,
        longest=found["max"] / 1e3,
        failed=found["failed"],
    )


def at_rate(url: str, per_second: float, seconds: float) -> Rate:
    """Requests at fixed times, whether or not those before were answered.

    A time is taken from when a request was due, not from when a connection was free for it: a server that stalls is
    charged for all who would have come meanwhile (no coordinated omission, of which wrk's own latencies are not free).
    """
    return asyncio.run(_at_rate(urlsplit(url).netloc, urlsplit(url).path, per_second, seconds))


async def _at_rate(netloc: str, path: str, per_second: float, seconds: float) -> Rate:
    host, _, port = netloc.partition(":")
    request = f"GET {path or '/'} HTTP/1.1\r\nHost: {netloc}\r\n\r\n".encode()
    times: list[float] = []
    failed = 0
    due: asyncio.Queue[float | None] = asyncio.Queue()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal failed
        while (at := await due.get()) is not None:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length))
            times.append(time.perf_counter() - at)
            failed += not head.startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()

    opened = [await asyncio.open_connection(host, int(port)) for _ in range(4 * CONNECTIONS)]
    connections = [asyncio.create_task(connection(*streams)) for streams in opened]
    began = time.perf_counter() + 0.1
    for number in range(round(per_second * seconds)):
        at = began + number / per_second
        if (early := at - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        due.put_nowait(at)
    for _ in connections:
        due.put_nowait(None)
    await asyncio.gather(*connections)
    took = time.perf_counter() - began
    times.sort()
    return Rate(
        answers=len(times),
        per_second=(len(times) - failed) / took,
        p50=times[len(times) // 2] * 1e3,
        p99=times[math.ceil(len(times) * 0.99) - 1] * 1e3,
        longest=times[-1] * 1e3,
        failed=failed,
    )


def download(url: str) -> float:
    """Fetch and throw away; bytes a second.

    Raises:
        ConnectionError: no 200, or less than was announced.
    """
    parts = urlsplit(url)
    buffer = bytearray(1 << 20)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60) as client:
        began = time.perf_counter()
        client.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        first = b""
        while b"\r\n\r\n" not in first:
            first += client.recv(1 << 16)
        head, _, body = first.partition(b"\r\n\r\n")
        expected = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        received = len(body)
        while count := client.recv_into(buffer):
            received += count
        took = time.perf_counter() - began
    if not head.startswith(b"HTTP/1.1 200") or received != expected:
        raise ConnectionError(f"{head[:15]!r}, {received} bytes of {expected}")
    return received / took


@contextmanager
def listeners(url: str, count: int) -> Iterator[None]:
    """So many open event streams, each of which has got its first event; nobody reads on."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: text/event-stream\r\n\r\n".encode()
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            client = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60)
            clients.append(client)
            client.sendall(request)
            while b"data: " not in client.recv(1 << 16, socket.MSG_PEEK):
                time.sleep(0.001)
        yield
    finally:
        for client in clients:
            client.close()

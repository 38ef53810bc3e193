"""Something between a client and its service that cuts connections off and answers for it: a proxy, a bad network."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Cut:
    """The connection ends after so many bytes of answers; with 0 what was asked is done and nobody is told."""

    after: int


def answer(status: int, body: object = None, headers: Mapping[str, str] | None = None) -> bytes:
    """An HTTP answer, the last of its connection."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = {"Content-Length": str(len(content)), "Connection": "close"} | dict(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Scripted\r\n{head}\r\n".encode() + content


class Between:
    """A port before a service. Its first connections meet the fates they are given, in order; all others pass."""

    def __init__(self, url: str, *fates: Cut | bytes, port: int = 0) -> None:
        parts = urlsplit(url)
        self._upstream = (parts.hostname or "", parts.port or 0)
        self._fates = deque(fates)
        self.seen = bytearray()
        """Everything that clients sent."""
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for end in self._open:
            _close(end)
        for thread in self._threads[1:]:
            thread.join()

    def headers(self, name: str) -> list[str]:
        """A header's values in the order in which they were sent."""
        return [match.decode() for match in re.findall(rb"(?im)^" + name.encode() + rb": (.*?)\r$", bytes(self.seen))]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fate = self._fates.popleft() if self._fates else None
            self._open.append(client)
            if isinstance(fate, bytes):
                self._start(self._answer, client, fate)
                continue
            service = socket.create_connection(self._upstream)
            self._open.append(service)
            self._start(self._forward, client, service)
            self._start(self._back, service, client, fate)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _answer(self, client: socket.socket, text: bytes) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(65536)
        length = re.search(rb"(?i)content-length: (\d+)", request)
        while length and len(request.partition(b"\r\n\r\n")[2]) < int(length[1]):
            request += client.recv(65536)
        self.seen += request
        client.sendall(text)
        _close(client)

    def _forward(self, client: socket.socket, service: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self.seen += data
                service.sendall(data)
        _close(service)

    def _back(self, service: socket.socket, client: socket.socket, cut: Cut | None) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := service.recv(65536):
                if cut and sent + len(data) > cut.after:
                    client.sendall(data[: cut.after - sent])
                    break
                sent += len(data)
                client.sendall(data)
        _close(client)
        _close(service)


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()

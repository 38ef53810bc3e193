"""Receivers of webhooks on this machine: a real TLS server, and hostile ones."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.client import parse_headers
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import BinaryIO, cast

from service.webhooks.posting import Poster


@dataclass(frozen=True)
class Request:
    """One POST as it came; the names of headers in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes
    sni: str | None


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._made = 0
        self.path = folder / "ca.pem"
        self._run("-subj", "/CN=authority", "-keyout", str(folder / "ca.key"), "-out", str(self.path))

    def client(self) -> ssl.SSLContext:
        """Trusts it and nobody else."""
        return ssl.create_default_context(cafile=str(self.path))

    def server(self, *names: str) -> ssl.SSLContext:
        """With a certificate for these names."""
        self._made += 1
        key, certificate = self._folder / f"{self._made}.key", self._folder / f"{self._made}.pem"
        self._run(
            *("-CA", str(self.path), "-CAkey", str(self._folder / "ca.key"), "-subj", "/CN=receiver"),
            *("-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-keyout", str(key), "-out", str(certificate)),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        return context

    @staticmethod
    def _run(*arguments: str) -> None:
        new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        subprocess.run(["openssl", *new, *arguments], check=True, capture_output=True)


class Receiver:
    """Answers each connection with the next of its behaviours, and with the last one from then on.

    A behaviour is a status with headers, `503` or `429 Retry-After: 7` say, or the name of a hostile one.
    """

    def __init__(self, tls: ssl.SSLContext, *behaviours: str) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self._behaviours = deque(behaviours or ("200",))
        self._names: dict[int, str | None] = {}
        self._tls = tls
        self._tls.sni_callback = self._note_name
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Cut everything off."""
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _note_name(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        self._names[id(connection)] = name

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            behaviour = self._behaviours.popleft() if len(self._behaviours) > 1 else self._behaviours[0]
            threading.Thread(target=self._serve, args=(connection, behaviour), daemon=True).start()

    def _serve(self, connection: socket.socket, behaviour: str) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            if before := BEFORE_TLS.get(behaviour):
                before(connection, self._stopping)
                return
            with self._tls.wrap_socket(connection, server_side=True) as secure:
                stream = cast(BinaryIO, secure.makefile("rb"))
                line = stream.readline().decode().strip()
                if not line:  # a client that ended before its request asked for nothing
                    return
                headers = {name.lower(): value for name, value in parse_headers(stream).items()}
                body = stream.read(int(headers["content-length"]))
                self.requests.append(Request(line, headers, body, self._names.pop(id(secure), None)))
                if after := AFTER_REQUEST.get(behaviour):
                    after(secure, self._stopping)
                    return
                status, _, extra = behaviour.partition(" ")
                secure.sendall(f"HTTP/1.1 {status} -\r\n{extra}\r\nContent-Length: 2\r\n\r\nok".encode())


Hostility = Callable[[socket.socket, threading.Event], None]


def _hang(_: socket.socket, stopping: threading.Event) -> None:
    stopping.wait()


def _repeat(first: bytes, again: bytes, pause: float) -> Hostility:
    def run(connection: socket.socket, stopping: threading.Event) -> None:
        connection.sendall(first)
        while not stopping.wait(pause):
            connection.sendall(again)

    return run


def _reset(connection: socket.socket, _: threading.Event) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _endless_body(connection: socket.socket, stopping: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 500 -\r\n\r\n")
    while not stopping.is_set():
        connection.sendall(bytes(65536))


BEFORE_TLS: dict[str, Hostility] = {
    "silence": _hang,
    "reset": _reset,
    "garbage": lambda connection, _: connection.sendall(b"\x16\x03\x01 this is no TLS " * 1000),
    "dripped handshake": _repeat(b"\x16\x03\x03\x40\x00", b"\x02", 0.05),
}
AFTER_REQUEST: dict[str, Hostility] = {
    "no answer": _hang,
    "close": lambda connection, _: connection.close(),
    "dripped headers": _repeat(b"HTTP/1.1 200 -\r\n", b"X", 0.05),
    "endless headers": _repeat(b"HTTP/1.1 200 -\r\n", b"X-A: " + b"a" * 60_000 + b"\r\n", 0),
    "endless 103": _repeat(b"", b"HTTP/1.1 103 -\r\n\r\n" * 100, 0.01),
    "endless body": _endless_body,
    "no HTTP": lambda connection, _: connection.sendall(b"SSH-2.0-x\r\n\r\n"),
}


class Network:
    """Names that lead to receivers on this machine, and a `Poster` that may go there."""

    def __init__(self, authority: Authority) -> None:
        self.names: dict[str, list[tuple[str, int]]] = {}
        self.asked: list[str] = []
        self._authority = authority
        self._receivers: list[Receiver] = []

    def receiver(self, name: str, *behaviours: str, certified: str | None = None) -> Receiver:
        """A receiver at this name, with a certificate for it or for another."""
        made = Receiver(self._authority.server(certified or name), *behaviours)
        self.names[name] = [("127.0.0.1", made.port)]
        self._receivers.append(made)
        return made

    def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        """As the name server answers."""
        self.asked.append(host)
        assert port == 443
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    @staticmethod
    def allow(address: IPv4Address | IPv6Address) -> bool:
        """Where the receivers are, and nowhere else."""
        return address == IPv4Address("127.0.0.1")

    def poster(self, total_seconds: float = 5.0) -> Poster:
        """Sends to them."""
        return Poster(self.resolve, self.allow, self._authority.client(), total_seconds)

    def stop(self) -> None:
        """Stop all receivers."""
        for receiver in self._receivers:
            receiver.stop()

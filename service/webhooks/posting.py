"""One attempt: POST to a URL of a stranger's choice, and nothing else can be made of it.

The name is resolved once. All its addresses must be public, and the connection goes to one of these very addresses,
while certificate, SNI and `Host` are the name's. httpcore follows no redirects and knows no proxies. Of the answer
the status and one header are read; its body is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Self

import httpcore
import httpx

from service.webhooks.addresses import is_public, resolve
from service.webhooks.contract import Target

Resolver = Callable[[str, int], list[tuple[str, int]]]
Allow = Callable[[IPv4Address | IPv6Address], bool]

# From the connection to the answer's headers, however slowly they come.
TOTAL_SECONDS = 15.0
# A look-up cannot be broken off: what took longer is not used. (The C library ends it in 30 s, as it is set up mostly.)
LOOKUP_SECONDS = 30.0
# Of one address, before the next is tried.
CONNECT_SECONDS = 4.0
MAX_ADDRESSES = 4


class Undelivered(Exception):
    """An attempt that got no answer. Its words are for the job's owner: they tell nothing of the network we are in."""


@dataclass(frozen=True)
class Answer:
    """What the receiver said."""

    status: int
    retry_after: str | None = None


class Poster:
    """Sends. Its arguments are what tests have to change to have a receiver on this machine.

    Args:
        resolver: name and port to the addresses and ports to connect to; may block.
        allow: the rule for addresses.
        tls: with the certificate authorities that are trusted.
        total_seconds: of one attempt, without the look-up.
    """

    def __init__(
        self,
        resolver: Resolver = resolve,
        allow: Allow = is_public,
        tls: ssl.SSLContext | None = None,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self._resolver = resolver
        self._allow = allow
        self._tls = tls or httpx.create_ssl_context()
        self._total_seconds = total_seconds

    async def post(self, target: Target, headers: dict[str, str], body: str) -> Answer:
        """One attempt.

        Raises:
            Undelivered: no answer came.
        """
        addresses = await self._addresses(target)
        try:
            async with asyncio.timeout(self._total_seconds):
                return await self._exchange(target, addresses, headers, body)
        except TimeoutError:
            raise Undelivered(f"no answer within {self._total_seconds:g} s") from None
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            # httpcore keeps what it mapped as an argument.
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in error.args):
                raise Undelivered("the receiver's certificate is not valid") from None
            raise Undelivered("no TLS connection could be made") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            raise Undelivered("the connection broke before an answer") from None

    async def _addresses(self, target: Target) -> list[tuple[str, int]]:
        """Where to connect to. A name without addresses and one with others than public ones are told alike, so that
        nobody learns which names a private network has."""
        began = time.monotonic()
        refused = Undelivered("the host name leads to no public address")
        try:
            found = await _in_thread(self._resolver, target.host, target.port)
            usable = found and all(self._allow(ipaddress.ip_address(address)) for address, _ in found)
        except (OSError, ValueError):  # ValueError: from getaddrinfo's IDNA codec, or what is no address
            raise refused from None
        if not usable:
            raise refused
        if time.monotonic() - began > LOOKUP_SECONDS:
            raise Undelivered("the host name could not be looked up in time")
        return found[:MAX_ADDRESSES]

    async def _exchange(
        self, target: Target, addresses: list[tuple[str, int]], headers: dict[str, str], body: str
    ) -> Answer:
        async with (
            _Pinned(addresses) as network,
            httpcore.AsyncConnectionPool(
                ssl_context=self._tls, max_keepalive_connections=0, network_backend=network
            ) as connection,
            connection.stream(
                "POST",
                httpcore.URL(scheme=b"https", host=target.host, port=target.port, target=target.path),
                headers=[
                    ("Host", target.authority),
                    ("User-Agent", "compress-to-impress"),
                    ("Content-Type", "application/json"),
                    ("Content-Length", str(len(body.encode()))),
                    ("Connection", "close"),
                    *headers.items(),
                ],
                content=body.encode(),
            ) as response,
        ):
            retry_after = next((value for name, value in response.headers if name.lower() == b"retry-after"), None)
            return Answer(response.status, retry_after.decode("latin-1") if retry_after is not None else None)


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to given addresses, whatever host it is asked for, and closes what it connected: httpcore leaves a
    socket open whose TLS handshake is cancelled."""

    def __init__(self, addresses: list[tuple[str, int]]) -> None:
        self._addresses = addresses
        self._network = httpcore.AnyIOBackend()
        self._stream: httpcore.AsyncNetworkStream | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._stream:
            await self._stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        error: Exception = httpcore.ConnectError()
        for address, number in self._addresses:
            try:
                self._stream = await self._network.connect_tcp(
                    address, number, CONNECT_SECONDS, local_address, socket_options
                )
                return self._stream
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failed:
                error = failed
        raise error


async def _in_thread(resolver: Resolver, host: str, port: int) -> list[tuple[str, int]]:
    """Run a look-up in a thread that nobody waits for at the process's end. There are as many as attempts."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[tuple[str, int]]] = loop.create_future()

    def settle(result: list[tuple[str, int]] | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result or [])

    def look_up() -> None:
        result, failure = None, None
        try:
            result = resolver(host, port)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=look_up, name="webhook look-up", daemon=True).start()
    return await future

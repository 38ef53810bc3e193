"""What a client says of a webhook and sees of it. The URL may hold a token: it is in no answer, log or message."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator

from service.strict import Strict
from service.webhooks.addresses import is_public

MAX_URL_CHARACTERS = 2048
PORTS = (443, 8443)

# At least one dot, and a last label that is no number: `localhost`, `127.1` and `0x7f.1` are no public names.
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])\Z")


@dataclass(frozen=True)
class Target:
    """A webhook's URL in its parts. What was checked is what is connected to: it is parsed here and nowhere else."""

    host: str
    """A name, or an address without brackets; lower case."""
    port: int
    path: str
    """With the query."""

    @property
    def authority(self) -> str:
        """The `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Target:
        """Take a URL apart.

        Raises:
            ValueError: saying what is wrong with it, without repeating it.
        """
        if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
            raise ValueError("visible ASCII characters alone; others percent-encoded, in the host name as `xn--`")
        try:
            parts = urlsplit(url)
            port = 443 if parts.port is None else parts.port
        except ValueError:
            raise ValueError("not a URL; one looks like https://HOST/PATH") from None
        if parts.scheme != "https":
            raise ValueError("must begin with https://")
        if "@" in parts.netloc:
            raise ValueError("must not hold a user or password; deliveries are signed, verify that")
        if "#" in url:
            raise ValueError("must not have a fragment (#)")
        if port not in PORTS:
            raise ValueError(f"the port must be {' or '.join(map(str, PORTS))}")
        host = (parts.hostname or "").lower()
        _check_host(host)
        return cls(host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def _check_host(host: str) -> None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.match(host):
            raise ValueError("the host must be a full public name, hooks.example.com say") from None
        return
    if not is_public(address):
        raise ValueError("the address is not a public one")


class Webhook(Strict):
    """Who is told of the job's end: an https URL that one POST goes to, repeated until it is answered with a 2xx."""

    url: Annotated[str, StringConstraints(strict=True, max_length=MAX_URL_CHARACTERS), Field(repr=False)]

    @field_validator("url")
    @classmethod
    def _check(cls, url: str) -> str:
        Target.parse(url)
        return url

    @property
    def target(self) -> Target:
        """The URL in its parts."""
        return Target.parse(self.url)


class DeliveryStatus(StrEnum):
    """How far the message of a job's end has come."""

    PENDING = "pending"
    """The job has not ended, or no attempt was answered with a 2xx yet and another follows."""
    DELIVERED = "delivered"
    """The receiver answered with a 2xx."""
    FAILED = "failed"
    """Given up: after the last attempt, or because the receiver answered 410."""


class WebhookState(Strict):
    """How far the message is. `last_error` says what became of the last attempt, null where it was delivered."""

    status: DeliveryStatus
    attempts: int = 0
    last_error: str | None = None

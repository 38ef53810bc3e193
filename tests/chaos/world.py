"""A service in parts, each a process of its own that can be killed: Redis, the API, two workers, real models."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from redis import Redis
from redis.exceptions import RedisError

from service.connections import connect, socket_url
from service.embedded import find_server
from service.processes import die_with_parent
from tests import tiny
from tests.chaos.watch import Watcher
from tests.live import REPOSITORY, wait_until

# Each process of a world has this variable, and so have those that it starts: no orphan hides.
MARK = "C2I_CHAOS_WORLD"
MODEL = "tiny-llama"
# Some six megabytes, that a download takes more than what the kernel buffers.
WIDTH = 8192
# The disk of data, which a fault fills.
DISK_BYTES = 1 << 29
GRACE_SECONDS = 3
READY_SECONDS = 60.0
END_SECONDS = 150.0
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
# Kinds of jobs: examples, passes. All jobs of a kind must come to the same adapter, to the bit.
KINDS = ((24, 1), (40, 1), (40, 2))


class Part:
    """A process that is started with the same command again and again."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._command = list(command)
        self._env = dict(env)
        self.log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it. It dies with the thread that calls this."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - calls prctl and getppid only
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._process:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; it is gone on return."""
        self.signal(signal.SIGKILL)
        self.wait(30)

    def wait(self, timeout: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout) if self._process else 0


@dataclass
class Accepted:
    """A job that got its 202."""

    id: str
    kind: int
    may_fail: set[str] = field(default_factory=set)
    """Codes of errors that the blow explains."""
    may_be_cancelled: bool = False
    may_be_gone: bool = False

    @property
    def name(self) -> str:
        """Of its process."""
        return self.id[-15:]


class World:
    """One service. All its processes are started by the thread that makes it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.data = folder / "data"
        self.temporary = folder / "tmp"
        for path in (self.data, self.temporary, folder / "redis"):
            path.mkdir(parents=True)
        self.own_disk = _mount(self.data)
        shutil.copytree(model, self.data / "models" / MODEL)
        self.redis_url = socket_url(str(folder / "redis" / "redis.sock"))
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.client: Redis = connect(self.redis_url)
        self.faults_of_server: list[str] = []
        """Answers that no outage explains."""
        self.jobs: list[Accepted] = []
        self._make_parts()
        self.watcher = Watcher(lambda: [worker.pid for worker in self.workers if worker.lives])

    def _make_parts(self) -> None:
        env = {name: value for name, value in os.environ.items() if name != "REDIS_URL" and not name.startswith("C2I_")}
        env |= {MARK: self.mark, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        ours = env | {"REDIS_URL": self.redis_url, "C2I_GRACE_SECONDS": str(GRACE_SECONDS)}
        cli = [sys.executable, "-m", "service.cli"]
        home = self.folder / "redis"
        self.redis = Part(
            "redis",
            [
                str(find_server()),
                *("--port", "0", "--unixsocket", str(home / "redis.sock"), "--dir", str(home)),
                *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxmemory-policy", "noeviction"),
            ],
            env,
            self.folder,
        )
        serve = [*cli, "serve", "--workers", "0", "--port", str(self.port), "--data", str(self.data), "--json"]
        self.api = Part("api", serve, ours, self.folder)
        work = [*cli, "worker", "--data", str(self.data)]
        self.workers = [Part(f"worker-{number}", work, ours, self.folder) for number in (1, 2)]

    @property
    def parts(self) -> list[Part]:
        """All, in the order of their start."""
        return [self.redis, self.api, *self.workers]

    # --- start and end -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up, and looked at."""
        self.watcher.start()
        self.revive()
        self.await_ready()

    def revive(self) -> None:
        """Start what does not run, as a supervisor does."""
        for part in self.parts:
            if not part.lives:
                part.start()
                if part is self.redis:
                    wait_until(self._redis_answers, READY_SECONDS, "Redis answers")

    def _redis_answers(self) -> bool:
        with Redis.from_url(self.redis_url, socket_timeout=5) as redis:
            try:
                return bool(redis.ping())
            except RedisError:
                return False

    def await_ready(self) -> None:
        """Until the API answers and says that it can work, and both workers have announced themselves."""
        wait_until(lambda: self._workers_announced() >= 2, READY_SECONDS, "the API and two workers are there")

    def _workers_announced(self) -> int:
        try:
            pids = {worker.pid for worker in self.workers}
            answer = self.http.get("/v1/workers", timeout=5)
            return len(pids & {worker["pid"] for worker in answer.json()["data"]}) if answer.is_success else 0
        except httpx.TransportError:
            return 0

    def ready(self) -> bool:
        """Whether the API says that it can work."""
        try:
            return self.http.get("/readyz", timeout=5).is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Nothing of it is left but its folder."""
        self.http.close()
        self.client.close()
        self.watcher.stop()
        for part in reversed(self.parts):
            if part.lives:
                part.signal(signal.SIGCONT)
                part.kill()
        if self.own_disk:
            subprocess.run(["umount", "--lazy", str(self.data)], check=False)

    # --- a client that goes on -----------------------------------------------------------------------------------

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Sent again through outages until it is answered; what is neither an answer nor an outage is noted."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                answer = self.http.request(method, path, **more)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code != 503:
                if answer.status_code >= 500:
                    self.faults_of_server.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
                return answer
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer to {method} {path}: {answer and answer.text}")
            threading.Event().wait(0.1)

    def submit(self, rng: random.Random) -> Accepted:
        """A job that is accepted, whatever it takes; the `Idempotency-Key` keeps it one."""
        kind = rng.randrange(len(KINDS))
        examples, passes = KINDS[kind]
        tag = uuid.UUID(int=rng.getrandbits(128)).hex
        body = {
            "model": MODEL,
            "examples": tiny.learnable_examples(examples),
            "passes": passes,
            "metadata": {"tag": tag},
        }
        headers = {"Idempotency-Key": tag, "Content-Type": "application/json"}
        answer = self.request("POST", "/v1/jobs", content=json.dumps(body), headers=headers)
        assert answer.status_code == 202, answer.text
        job = Accepted(str(answer.json()["id"]), kind)
        self.jobs.append(job)
        return job

    def job(self, job_id: str) -> dict[str, Any] | None:
        """Its record; None where there is none."""
        answer = self.request("GET", f"/v1/jobs/{job_id}")
        return dict(answer.json()) if answer.is_success else None

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """What happened to it."""
        answer = self.request("GET", f"/v1/jobs/{job_id}/events")
        return list(answer.json()["data"]) if answer.is_success else []

    def at_work(self) -> dict[str, int]:
        """Jobs that a process works on, and its pid."""
        alive = self.watcher.alive()
        return {job.id: alive[job.name][0] for job in self.jobs if alive.get(job.name)}

    def await_ends(self) -> list[Accepted]:
        """Until every job has ended; those that have not."""
        deadline = time.monotonic() + END_SECONDS
        waiting = list(self.jobs)
        while waiting and time.monotonic() < deadline:
            waiting = [job for job in waiting if (record := self.job(job.id)) and record["status"] not in TERMINAL]
            threading.Event().wait(0.2)
        return waiting


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mount(folder: Path) -> bool:
    """A small disk of its own under the folder, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0

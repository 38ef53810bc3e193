"""A Redis as an operator has one: on a port, with whatever it is started with."""

from __future__ import annotations

import socket
import subprocess
from contextlib import suppress
from datetime import timedelta
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from service.connections import connect
from service.embedded import find_server
from service.jobs import JobSpec
from service.queue import JobQueue
from service.records import new_job_id
from tests.live import wait_until


class OwnRedis:
    """One on a free port."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port: int = taken.getsockname()[1]
        self._queue = JobQueue(connect(f"redis://127.0.0.1:{self.port}/0"), timedelta(days=1))

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        command = [str(find_server()), "--port", str(self.port), "--save", "", "--daemonize", "yes", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wait_until(self._answers, 10, "Redis answers")

    def stop(self) -> None:
        """Stop it if it runs, whoever started it."""
        if self._answers():
            self._queue.redis.shutdown(nosave=True)
            wait_until(lambda: not self._answers(), 10, "Redis has ended")
        self._queue.redis.close()

    def create_job(self, body: dict[str, Any]) -> str:
        """Queue a job; its ID."""
        return self._queue.create(new_job_id(), JobSpec.parse(body)).id

    def jobs(self) -> set[str]:
        """The IDs of the jobs there are."""
        return {job.id for job in self._queue.list_jobs(10)}

    def _answers(self) -> bool:
        with Redis(port=self.port, retry=Retry(NoBackoff(), 0)) as probe, suppress(RedisError):
            return bool(probe.ping())
        return False

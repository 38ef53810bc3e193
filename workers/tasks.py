"""What a worker takes from a queue and does in a process of its own: jobs, which are adapted; tries are the other kind
(`workers.answering`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from redis import Redis
from rq import Queue

from service import workforce
from service.artifacts import ArtifactStore
from service.connections import connect
from service.errors import C2IError
from service.jobs import JobStatus
from service.limits import QueueLimits
from service.logs import named
from service.queue import JobQueue
from service.settings import Settings
from service.workforce import WorkerInfo, WorkerState
from workers.attempt import Adapt, run_attempt
from workers.limits import Terms, Watch

logger = named(__name__)


class Records(Protocol):
    """What a worker asks and tells a queue; `service.queue.JobQueue` says what each is."""

    redis: Redis
    deliveries: Queue

    def start(self, job_id: str, /) -> int: ...

    def drop(self, delivery: str, /) -> None: ...

    def renew_lease(self, job_id: str, attempt: int, /) -> None: ...

    def attempt_status(self, job_id: str, attempt: int, /) -> JobStatus | None: ...

    def fail(self, job_id: str, attempt: int, error: C2IError, /) -> None: ...

    def cancelled(self, job_id: str, attempt: int, /) -> None: ...

    def give_back(
        self, job_id: str, attempt: int, reason: str, /, *, crashed: bool, error: C2IError | None = None
    ) -> None: ...


class Task(Protocol):
    """One kind of work."""

    label: str
    """The name of its ID in logs."""

    @property
    def queue(self) -> Records:
        """Where it comes from."""

    def announce(self, state: WorkerState, at: tuple[str, int] | None) -> None:
        """Say that this worker lives and what it has: an ID and an attempt."""

    def leave(self) -> None:
        """This worker ends."""

    def watch(self, pid: int, job_id: str, attempt: int) -> Watch:
        """The limits of an attempt whose process has just begun."""

    def run(self, job_id: str, attempt: int) -> None:
        """Do it and record what came of it; in its process."""

    def clear(self, job_id: str, attempt: int) -> None:
        """Remove what its process may have left on the disk."""


class Adaptations:
    """Jobs."""

    label = "job_id"

    def __init__(self, settings: Settings, redis_url: str, adapt: Adapt, introduce: Callable[[], WorkerInfo]) -> None:
        """
        Args:
            introduce: describes this worker.

        Raises:
            Unavailable: Redis does not answer, or nothing can be computed here.
        """
        self.queue = JobQueue(connect(redis_url), settings.job_ttl, QueueLimits.of(settings))
        self.queue.check()
        self._store = ArtifactStore(settings.artifacts)
        self._settings = settings
        self._adapt = adapt
        self._info = introduce()
        logger.info("taking jobs", worker=self._info.id, device=self._info.device, threads=self._info.threads)

    def announce(self, state: WorkerState, at: tuple[str, int] | None) -> None:
        """In `/v1/workers`."""
        job_id, attempt = at or (None, None)
        info = self._info.model_copy(update={"state": state, "job_id": job_id, "attempt": attempt})
        workforce.heartbeat(self.queue.redis, info)

    def leave(self) -> None:
        """Not in `/v1/workers` any more."""
        workforce.leave(self.queue.redis, self._info.id)

    def watch(self, pid: int, job_id: str, attempt: int) -> Watch:
        """As the operator set the limits of a job."""
        terms = Terms(seconds=self._settings.job_timeout_seconds)
        return Watch(pid, self._settings, terms, lambda: self._store.workspace_bytes(job_id, attempt))

    def run(self, job_id: str, attempt: int) -> None:
        """Adapt, publish, record."""
        run_attempt(self.queue, self._store, self._settings, self._adapt, job_id, attempt)

    def clear(self, job_id: str, attempt: int) -> None:
        """Its workspace."""
        self._store.clear_workspace(job_id, attempt)

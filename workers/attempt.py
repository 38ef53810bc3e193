"""One attempt at a job, in the process that was forked for it: adapt, publish, record."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from redis.exceptions import RedisError

from service import models
from service.artifacts import ArtifactStore, disk_is_full, error_number
from service.errors import C2IError, Conflict, InternalError, JobNotFound, Unavailable
from service.jobs import JobSpec, Progress, Stage
from service.limits import check_disk
from service.logs import named
from service.queue import JobQueue
from service.reports import Report
from service.settings import Settings
from workers.limits import Terms, out_of_disk
from workers.memory import is_out_of_memory
from workers.progress import OnProgress

logger = named(__name__)

# Progress within a stage is written no more often.
PROGRESS_SECONDS = 0.5


class Adapt(Protocol):
    """`workers.adaptation.adapt`: writes everything that is to be published into `out`."""

    def __call__(
        self, spec: JobSpec, model: models.Model, out: Path, *, cache: Path, on_progress: OnProgress
    ) -> Report: ...


def run_attempt(
    queue: JobQueue, store: ArtifactStore, settings: Settings, adapt: Adapt, job_id: str, attempt: int
) -> None:
    """Adapt, publish, record."""
    try:
        spec = store.get_input(job_id)
        model = models.resolve(settings.models, spec.model)
        check_disk(model, store, settings.job_disk_bytes, spec.copies)
        with store.workspace(job_id, attempt) as out:
            progress = _progress_writer(queue, job_id, attempt)
            report = adapt(spec, model, out, cache=settings.cache, on_progress=progress)
            published = sum(file.bytes for file in store.publish(job_id, attempt, out))
        _insist(lambda: queue.succeed(job_id, attempt, report.brief(), published))
        logger.info("the job succeeded", improved=report.improved)
    except (Conflict, JobNotFound) as error:
        logger.info("publishing nothing", reason=error.message)
        store.withdraw(job_id, attempt)
    except RedisError:
        raise
    except Exception as error:
        ours = explain(error, settings)
        if ours is not error:
            logger.exception("the attempt failed")
        with contextlib.suppress(Conflict, JobNotFound):
            _insist(lambda: queue.fail(job_id, attempt, ours))
            logger.info("the job failed", code=ours.code, reason=ours.message)


def _progress_writer(queue: JobQueue, job_id: str, attempt: int) -> OnProgress:
    stage_before: Stage | None = None
    percent_before = 0.0
    written = 0.0

    def write(stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None:
        nonlocal stage_before, percent_before, written
        percent_before = max(percent_before, min(percent, 100.0))
        if stage is stage_before and time.monotonic() - written < PROGRESS_SECONDS:
            return
        progress = Progress(stage=stage, percent=percent_before, eta_seconds=eta_seconds)
        stage_before, written = stage, time.monotonic()
        try:
            queue.progress(job_id, attempt, progress, message)
        except RedisError as error:
            logger.warning("progress is not written", exc_info=error)

    return write


def _insist(write: Callable[[], None]) -> None:
    """Write a result even if Redis is away: hours of work hang on it. The lease's end ends this process."""
    while True:
        try:
            write()
        except RedisError:
            time.sleep(0.5)
        else:
            return


def explain(error: Exception, settings: Settings) -> C2IError:
    """An exception of the adaptation, in words for its user. They hold no path and nothing of the examples."""
    if isinstance(error, C2IError):
        return error
    if is_out_of_memory(error):
        return Terms().out_of_memory("the job needed more memory than its worker has")
    if error_number(error) == errno.EFBIG:  # a file grew past the limit of its process
        return out_of_disk(settings.job_disk_bytes)
    if disk_is_full(error):
        return Unavailable("the server's disk is full")
    return InternalError("an internal error in the worker; its log has the details under the job's ID")

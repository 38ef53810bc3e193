"""Takes jobs, or tries, and runs each in a child process: liveness, cancelling, crashes. No mathematics.

rq dequeues and forks. What a job is and what became of it stands in our own records (`service.queue`), so rq's
registries, results and commands are not used, nor its thread: the parent imports torch and transformers, that a
child starts at once, but runs no tensor operation and no thread, that a fork is safe.

A child dies with its parent (the kernel sees to it), the parent kills the child's process group when the job is
cancelled or over a limit (`workers.limits`), and the parent's lease on the job lapses when the parent is killed or
stopped, and the child with it (`workers.lease`).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import rq
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq.exceptions import StopRequested
from rq.worker import WorkerStatus

from service.errors import C2IError, Conflict, NotFound
from service.fairness import Held
from service.jobs import JobStatus
from service.logs import belongs_to, named, take_over
from service.processes import adopt_orphans, die_with_parent
from service.settings import Settings
from service.workforce import WorkerState
from workers.attempt import Adapt
from workers.lease import Lease
from workers.limits import Output, Watch, end_descendants, limit_this_process
from workers.machine import Machine, in_child, introduce, measure
from workers.tasks import Adaptations, Task

logger = named(__name__)

# How often the parent looks whether its job was cancelled.
LOOK_SECONDS = 0.25
# How often it renews the lease: a write, which Redis syncs to disk.
RENEW_SECONDS = 2.0
# A worker that could not start a job's process takes the next job no sooner.
FAILURE_SECONDS = 3.0
# How long the end of a job waits for a Redis that restarts.
PATIENCE_SECONDS = 60.0


def work(settings: Settings, redis_url: str, adapt: Adapt, probe: Callable[[], Machine] = measure) -> None:
    """Take jobs until a signal says to stop; a Redis that goes away is waited for.

    Args:
        probe: finds what can be computed with; runs in a process of its own.

    Raises:
        Unavailable: Redis does not answer at the start, or nothing can be computed here.
    """
    take(lambda: Adaptations(settings, redis_url, adapt, lambda: introduce(in_child(probe))), settings)


def take(prepare: Callable[[], Task], settings: Settings) -> None:
    """Work at one kind of task until a signal says to stop. Raises what `prepare` does."""
    take_over()
    task = prepare()
    adopt_orphans()
    stopped = False
    with contextlib.suppress(StopRequested):  # between two rounds
        while not stopped:
            worker = Worker(task, settings)
            try:
                worker.work(logging_level="WARNING")
            except RedisError as error:
                logger.warning("Redis does not answer", exc_info=error)
                time.sleep(1)
            stopped = worker.stopped
    with contextlib.suppress(RedisError):
        task.leave()


class Worker(rq.Worker):
    """One job, or try, at a time, each in a process of its own."""

    # After a restart of Redis a worker is back in no more than this.
    max_connection_wait_time = 2.0
    # How long a worker waits for the answer of a Redis that gives none, and cannot look after its job: rq would wait
    # for 15 s. It asks Redis to wait for a job for five seconds at a time.
    connection_timeout = 10

    def __init__(self, task: Task, settings: Settings) -> None:
        queue = task.queue
        deliveries = queue.deliveries
        super().__init__([deliveries], connection=queue.redis, serializer=deliveries.serializer, worker_ttl=20)
        self._task = task
        self._queue = queue
        self._settings = settings
        self._busy = False
        self._at: tuple[str, int] | None = None
        self._grace_ends = float("inf")
        # Of the attempt that runs.
        self._lease = Lease()
        self._output: Output
        self._ended_for: C2IError | str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the work."""
        return bool(self._stop_requested)

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Announce this worker. rq calls it every few seconds while it waits, and we while a job runs."""
        super().heartbeat(timeout, pipeline)
        state = WorkerState.BUSY if self._busy else WorkerState.IDLE
        state = WorkerState.STOPPING if self._stop_requested else state
        self._task.announce(state, self._at)

    def execute_job(self, job: rq.job.Job, queue: rq.Queue) -> None:
        """Run one delivery to its end; Redis may go away meanwhile."""
        self._busy = True
        try:
            self._execute(job, queue)
        except RedisError as error:
            logger.warning("cannot record what became of a job; its lease lapses and it runs again", exc_info=error)
        finally:
            self._busy = False
            belongs_to()
            self._at = None

    def _execute(self, job: rq.job.Job, queue: rq.Queue) -> None:
        job_id = job.args[0]
        self._lease, self._ended_for = Lease(), None
        try:
            attempt = self._queue.start(job_id)
        except Held:
            logger.info("the job waits for another of its owner's", **{self._task.label: job_id})
            return
        except (Conflict, NotFound) as error:
            logger.info("not starting it", **{self._task.label: job_id}, reason=error.message)
            self._queue.drop(job.id)
            return
        belongs_to(**{self._task.label: job_id}, attempt=attempt)
        logger.info("starting it")
        job.args = (job_id, attempt)
        self.set_state(WorkerStatus.BUSY)
        self._at = (job_id, attempt)
        try:
            self._output = Output(passes_print=self._settings.log_level == "DEBUG")
            self.fork_work_horse(job, queue)
        except OSError as error:  # no memory, no process or no descriptor is to be had: not by the next job either
            logger.error("no process can be started", error=os.strerror(error.errno or 0))
            self._queue.give_back(job_id, attempt, "its worker could not start a process", crashed=False)
            time.sleep(FAILURE_SECONDS)
            return
        # The child does the same: whoever comes first, no kill of the group can reach the parent.
        with contextlib.suppress(OSError):
            os.setpgid(self.horse_pid, self.horse_pid)
        watch = self._task.watch(self.horse_pid, job_id, attempt)
        try:
            code = self._await_end(job_id, attempt, watch)
            self._task.clear(job_id, attempt)
            self._settle(job_id, attempt, code, watch)
        finally:
            end_descendants()  # also where this process failed
            self._horse_pid = 0
            self._output.close()

    def _await_end(self, job_id: str, attempt: int, watch: Watch) -> int:
        """Keep the lease until the child has ended, and end it where the job is to stop; its exit code."""
        child = os.pidfd_open(self.horse_pid)
        poll = select.poll()
        poll.register(child, select.POLLIN)
        renewed = float("-inf")
        try:
            while True:
                self._output.pass_on()
                if time.monotonic() - renewed > RENEW_SECONDS and self._renew(job_id, attempt):
                    renewed = time.monotonic()
                self._ended_for = self._ended_for or watch.breach()
                if self._is_to_stop(job_id, attempt):
                    self.kill_horse()
                if poll.poll(LOOK_SECONDS * 1000):
                    break
        finally:
            os.close(child)
        _, status = os.waitpid(self.horse_pid, 0)
        end_descendants()
        return os.waitstatus_to_exitcode(status)

    def _renew(self, job_id: str, attempt: int) -> bool:
        now = time.monotonic()
        try:
            self._queue.renew_lease(job_id, attempt)
            self._lease.renewed(now)
            self.heartbeat()
        except RedisError as error:
            logger.warning("Redis does not answer while the job runs", exc_info=error)
            return False
        return True

    def _is_to_stop(self, job_id: str, attempt: int) -> bool:
        if time.monotonic() >= self._grace_ends:
            self._ended_for = self._ended_for or "its worker was stopped"
        if self._ended_for:
            return True
        try:
            return self._queue.attempt_status(job_id, attempt) in (None, JobStatus.CANCELLING)
        except RedisError:
            return False

    def _settle(self, job_id: str, attempt: int, code: int, watch: Watch) -> None:
        """Record what the child could not record itself, when Redis is there again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with contextlib.suppress(Conflict, NotFound):
                    self._record_end(job_id, attempt, code, watch)
            except RedisError:
                if self._stop_requested or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                break
        logger.info("the attempt ended", how=describe_exit(code), why=str(self._ended_for or "") or None)

    def _record_end(self, job_id: str, attempt: int, code: int, watch: Watch) -> None:
        status = self._queue.attempt_status(job_id, attempt)
        reason, error = describe_exit(code), None
        if status is JobStatus.CANCELLING:
            self._queue.cancelled(job_id, attempt)
        elif status is not JobStatus.RUNNING:
            return
        elif isinstance(self._ended_for, C2IError):
            self._queue.fail(job_id, attempt, self._ended_for)
        elif self._ended_for:
            self._queue.give_back(job_id, attempt, self._ended_for, crashed=False)
        elif self._lease.lapsed:
            self._queue.give_back(job_id, attempt, "its worker was cut off for too long", crashed=False)
        else:
            if code == -signal.SIGKILL and watch.memory_ran_out():
                reason = "the machine's memory ran out"
                error = watch.terms.out_of_memory(
                    f"{reason} when the {watch.terms.what} had {watch.peak_bytes / 1e9:.1f} GB of it"
                )
            self._queue.give_back(job_id, attempt, reason, crashed=True, error=error)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the child's process group, of which the parent is no member."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.horse_pid, sig)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """On SIGTERM an idle worker ends at once; a busy one lets its job run on for a time and then hands it back.

        A second signal, or SIGINT, which comes from a terminal, ends the time.
        """
        hurried = self._stop_requested or signum == signal.SIGINT
        self._grace_ends = float("-inf") if hurried else time.monotonic() + self._settings.grace_seconds
        self._stop_requested = True
        if not self._busy:
            raise StopRequested

    def main_work_horse(self, job: rq.job.Job, queue: rq.Queue) -> None:
        """The child, from its first line to its last."""
        die_with_parent(self.pid or 0)
        self._output.take_over()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = 1
        try:
            job_id, attempt = job.args
            # `ps` and `top` show which job it is by the end of its ID: a process's name has 15 characters.
            Path("/proc/self/comm").write_text(job_id[-15:])
            self._lease.bind_this_process()
            limit_this_process(self._settings)
            self._task.run(job_id, attempt)
            code = 0
        except BaseException:
            logger.exception("the job's process ends without a result")
        finally:
            os._exit(code)

    def subscribe(self) -> None:
        """No thread in the parent: cancelling goes by the job's record."""

    def unsubscribe(self) -> None:
        """Nothing to end."""


def describe_exit(code: int) -> str:
    """A child's exit code in words."""
    if code >= 0:
        return f"its process ended with code {code}"
    return f"its process was killed by {signal.Signals(-code).name}"

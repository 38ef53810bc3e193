"""Finds jobs whose worker is gone and gives them back; ends jobs that have expired; clears what was left on disk.

What ends with a job's time is its record and its files together: the record first, so that nobody is shown what is
about to go, then the files, of which a note in Redis is kept until they are gone.

It runs as a thread of every API process. Two of them are no harm: each change is a transaction.
"""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta

from redis.exceptions import RedisError

from service.artifacts import ArtifactStore
from service.errors import Conflict, NotFound
from service.jobs import JobStatus
from service.logs import named
from service.queue import LEASE_SECONDS, JobQueue
from service.records import JOB_ID
from service.tries.queue import TryQueue
from service.uploads import Uploads

logger = named(__name__)

# With a lease of 18 s that was renewed up to two before, a job is back in the queue 17 to 22 s after its worker was
# killed: what seems lost is soon looked at again.
LOOK_SECONDS = 3.0
SUSPECT_SECONDS = 1.0
CLEAN_SECONDS = 600.0
# How long no lapsed lease is trusted after Redis was away: leases lapsed with it, and their workers may be well.
DOUBT_SECONDS = float(LEASE_SECONDS)
# An input without a record: of a request that was cut off between the two.
ORPHAN = timedelta(days=1)


class Reaper(threading.Thread):
    """Looks every few seconds until it is stopped."""

    def __init__(self, queue: JobQueue, store: ArtifactStore, ttl: timedelta) -> None:
        super().__init__(name="reaper", daemon=True)
        self._queue = queue
        self._tries = TryQueue(queue.redis)
        self._store = store
        self._ttl = ttl
        self._stopping = threading.Event()
        self._suspects: dict[str, int] = {}
        self._doubts_until = float("-inf")

    def run(self) -> None:
        """Look, and now and then clean, until `stop`."""
        cleaned = float("-inf")
        while not self._stopping.is_set():
            try:
                self.look()
                if time.monotonic() - cleaned > CLEAN_SECONDS:
                    self.clean()
                    cleaned = time.monotonic()
            except RedisError as error:
                logger.warning("the reaper cannot reach Redis", exc_info=error)
            except Exception:
                logger.exception("the reaper failed; it goes on")
            self._stopping.wait(SUSPECT_SECONDS if self._suspects else LOOK_SECONDS)

    def stop(self) -> None:
        """End after the current look."""
        self._stopping.set()
        self.join()

    def look(self) -> None:
        """Recover what is lost, end what has expired, clear what nobody works in."""
        self._recover()
        self._queue.expire()
        deleted = self._queue.deleted()
        if deleted:
            self._store.delete(*deleted)
            for job_id in deleted:
                self._queue.files_deleted(job_id)
        # In this order: an attempt begins before its workspace is made.
        for job_id, attempt in self._store.workspaces():
            if self._queue.attempt_status(job_id, attempt) not in (JobStatus.RUNNING, JobStatus.CANCELLING):
                self._store.clear_workspace(job_id, attempt)

    def _recover(self) -> None:
        """Give back what was lost at the look before too: a job is never in two places, but for a moment in none.

        Raises:
            RedisError: Redis is away. Workers that are so too get time to come back with their jobs.
        """
        try:
            lost = self._queue.find_lost() | self._tries.find_lost()
        except RedisError:
            self._doubts_until = time.monotonic() + DOUBT_SECONDS
            raise
        if time.monotonic() < self._doubts_until:
            lost = {}
        for lost_id, attempt in lost.items():
            if self._suspects.get(lost_id) == attempt:
                logger.warning("a job or a try was lost; giving it back", id=lost_id, attempt=attempt)
                with contextlib.suppress(Conflict, NotFound):
                    (self._queue if JOB_ID.fullmatch(lost_id) else self._tries).recover(lost_id, attempt)
        self._suspects = lost

    def clean(self) -> None:
        """Remove files that no record knows: of inputs whose job was never created, of jobs lost with a Redis, and
        uploads that have expired.

        Those of lost jobs stay for as long as the jobs would have, as their records may come back: from a backup, or
        with the right REDIS_URL.
        """
        self._queue.prune()
        Uploads(self._store).expire()
        known = self._store.older_than(self._ttl)
        inputs = self._store.older_than(min(self._ttl, ORPHAN), unpublished=True)
        self._store.delete(*(job_id for job_id in {*known, *inputs} if not self._queue.exists(job_id)))

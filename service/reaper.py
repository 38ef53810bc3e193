"""Finds jobs whose worker is gone and gives them back; clears what killed attempts and expired jobs left on disk.

It runs as a thread of every API process. Two of them are no harm: each change is a transaction.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from datetime import timedelta

from redis.exceptions import RedisError

from service.artifacts import ArtifactStore
from service.errors import Conflict, JobNotFound
from service.queue import JobQueue

logger = logging.getLogger(__name__)

# With a lease of 18 s, a job is back in the queue 18 to 24 s after its worker was killed.
LOOK_SECONDS = 3.0
CLEAN_SECONDS = 600.0


class Reaper(threading.Thread):
    """Looks every few seconds until it is stopped."""

    def __init__(self, queue: JobQueue, store: ArtifactStore, ttl: timedelta) -> None:
        super().__init__(name="reaper", daemon=True)
        self._queue = queue
        self._store = store
        self._ttl = ttl
        self._stopping = threading.Event()
        self._suspects: dict[str, int] = {}

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
                logger.warning("the reaper cannot reach Redis: %s", error)
            except Exception:
                logger.exception("the reaper failed; it goes on")
            self._stopping.wait(LOOK_SECONDS)

    def stop(self) -> None:
        """End after the current look."""
        self._stopping.set()
        self.join()

    def look(self) -> None:
        """Recover what was lost at the look before too: a job is never in two places, but for a moment in none."""
        lost = self._queue.find_lost()
        for job_id, attempt in lost.items():
            if self._suspects.get(job_id) == attempt:
                logger.warning("job %s was lost in attempt %d; giving it back", job_id, attempt)
                with contextlib.suppress(Conflict, JobNotFound):
                    self._queue.recover(job_id, attempt)
        self._suspects = lost

    def clean(self) -> None:
        """Remove workspaces of attempts that are over, and files of jobs that have expired."""
        self._queue.prune()
        running = self._queue.running()
        for job_id, attempt in self._store.workspaces() - running:
            self._store.clear_workspace(job_id, attempt)
        for job_id in self._store.older_than(self._ttl):
            if not self._queue.exists(job_id):
                self._store.delete(job_id)
        self._store.sweep()

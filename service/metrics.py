"""`/metrics`: what Redis and the disk say at the scrape, and what this process answered (docs/metrics.md)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import counters
from service.access import Requests
from service.jobs import JobStatus
from service.queue import JobQueue
from service.workforce import WorkerState, list_workers

COUNTED = {
    counters.JOBS_CREATED: ("c2i_jobs_created", "Jobs accepted.", ()),
    counters.JOBS_ENDED: ("c2i_jobs_ended", "Jobs that ended, by how.", ("status",)),
    counters.ATTEMPTS: ("c2i_attempts", "Attempts at jobs begun.", ()),
    counters.ATTEMPTS_LOST: ("c2i_attempts_lost", "Attempts whose process or worker died.", ()),
    counters.WAIT_SECONDS: ("c2i_queue_wait_seconds", "Seconds that attempts had waited when they began.", ()),
    counters.WAITS: ("c2i_queue_waits", "Attempts that have waited so.", ()),
    counters.STAGE_SECONDS: ("c2i_stage_seconds", "Seconds in each stage of jobs.", ("stage",)),
    counters.STAGES: ("c2i_stages", "Stages of jobs left behind.", ("stage",)),
    counters.PUBLISHED_BYTES: ("c2i_published_bytes", "Bytes of artifacts published.", ()),
}


class Metrics:
    """The metrics of one API process."""

    def __init__(self, queue: JobQueue, artifacts: Path) -> None:
        self.requests = Requests()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self.requests.seconds)
        self._registry.register(self.requests.sent)
        self._registry.register(_State(queue, artifacts))

    def text(self) -> bytes:
        """In Prometheus' text format.

        Raises:
            RedisError: Redis does not answer.
        """
        return generate_latest(self._registry)


class _State(Collector):
    def __init__(self, queue: JobQueue, artifacts: Path) -> None:
        self._queue = queue
        self._artifacts = artifacts

    def describe(self) -> list[Metric]:
        """Nothing: names are not looked up before Redis can be asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask Redis and the disk."""
        census = self._queue.census()
        jobs = GaugeMetricFamily("c2i_jobs", "Jobs that have not ended, by status.", labels=("status",))
        for status in (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.CANCELLING):
            jobs.add_metric((status.value,), census.by_status.get(status, 0))
        yield jobs
        yield GaugeMetricFamily("c2i_jobs_kept", "Jobs with a record, ended ones included.", census.kept)
        yield GaugeMetricFamily("c2i_queue_depth", "Jobs in the queue that a free worker would take.", census.depth)
        oldest = time.time() - census.oldest if census.oldest else 0.0
        yield GaugeMetricFamily("c2i_queue_oldest_seconds", "Age of the queued job that was created first.", oldest)
        workers = GaugeMetricFamily("c2i_workers", "Workers that live, by state.", labels=("state",))
        states = [info.state for info in list_workers(self._queue.redis)]
        for state in WorkerState:
            workers.add_metric((state.value,), states.count(state))
        yield workers
        disk = shutil.disk_usage(self._artifacts)
        yield GaugeMetricFamily("c2i_disk_free_bytes", "Free on the disk of the artifact store.", disk.free)
        yield GaugeMetricFamily("c2i_disk_size_bytes", "Size of the disk of the artifact store.", disk.total)
        totals = counters.read(self._queue.redis)
        for name, (metric, description, labels) in COUNTED.items():
            family = CounterMetricFamily(metric, description, labels=labels)
            for values, total in totals.get(name, {} if labels else {(): 0.0}).items():
                family.add_metric(values, total)
            yield family

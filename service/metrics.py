"""`/metrics`: what Redis and the disk say at the scrape, and what this process answered (docs/metrics.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from service import counters
from service.access import Requests
from service.artifacts import ArtifactStore
from service.errors import Unavailable
from service.jobs import JobStatus, Stage
from service.logs import named
from service.queue import JobQueue
from service.webhooks.contract import DeliveryStatus
from service.workforce import WorkerState, list_workers

logger = named(__name__)

# A series beside each counter, with the time of its birth, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

_STATUSES = [status.value for status in JobStatus if status.terminal]
_WEBHOOKS = [DeliveryStatus.DELIVERED.value, DeliveryStatus.FAILED.value]
_TRIES = [JobStatus.SUCCEEDED.value, JobStatus.FAILED.value]
_STAGES = [stage.value for stage in Stage]
# Each with its label and all values of that: a total that begins at nought is one whose first increase is seen.
COUNTED: dict[str, tuple[str, str, str | None, list[str]]] = {
    counters.JOBS_CREATED: ("c2i_jobs_created", "Jobs accepted.", None, []),
    counters.JOBS_ENDED: ("c2i_jobs_ended", "Jobs that ended, by how.", "status", _STATUSES),
    counters.JOBS_REAPED: ("c2i_jobs_reaped", "Jobs whose worker was gone, given back.", None, []),
    counters.ATTEMPTS: ("c2i_attempts", "Attempts at jobs begun.", None, []),
    counters.ATTEMPTS_LOST: ("c2i_attempts_lost", "Attempts whose process or worker died.", None, []),
    counters.WAIT_SECONDS: ("c2i_queue_wait_seconds", "Seconds that attempts had waited when they began.", None, []),
    counters.WAITS: ("c2i_queue_waits", "Attempts that have waited so.", None, []),
    counters.STAGE_SECONDS: ("c2i_stage_seconds", "Seconds in each stage of jobs.", "stage", _STAGES),
    counters.STAGES: ("c2i_stages", "Stages of jobs left behind.", "stage", _STAGES),
    counters.PUBLISHED_BYTES: ("c2i_published_bytes", "Bytes of artifacts published.", None, []),
    counters.TRIES_ENDED: ("c2i_tries_ended", "Tries that ended, by how.", "status", _TRIES),
    counters.WEBHOOKS_ENDED: ("c2i_webhooks_ended", "Webhooks delivered or given up.", "status", _WEBHOOKS),
}


class Metrics:
    """The metrics of one API process."""

    def __init__(self, queue: JobQueue, store: ArtifactStore) -> None:
        """
        Args:
            queue: over connections that do not wait for Redis.
        """
        self.requests = Requests()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self.requests.seconds)
        self._registry.register(self.requests.sent)
        self._registry.register(_State(queue, store))

    def text(self) -> bytes:
        """In Prometheus' text format; without what stands in Redis, where that does not answer."""
        return generate_latest(self._registry)


class _State(Collector):
    def __init__(self, queue: JobQueue, store: ArtifactStore) -> None:
        self._queue = queue
        self._store = store

    def describe(self) -> list[Metric]:
        """Nothing: names are not looked up before Redis can be asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask Redis and the disk."""
        yield from self._readiness()
        try:
            yield from self._of_redis()
        except RedisError:
            logger.warning("metrics of jobs and workers are left out: Redis does not answer")

    def _readiness(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily(
            "c2i_ready", "Whether what jobs need can be written, as /readyz.", labels=("dependency",)
        )
        for name, check in (("redis", self._queue.check), ("disk", self._store.check)):
            try:
                check()
            except Unavailable:
                ready.add_metric((name,), 0)
            else:
                ready.add_metric((name,), 1)
        yield ready
        free, size = self._store.disk_bytes()
        yield GaugeMetricFamily("c2i_disk_free_bytes", "Free on the disk of the artifact store.", free)
        yield GaugeMetricFamily("c2i_disk_size_bytes", "Size of the disk of the artifact store.", size)

    def _of_redis(self) -> Iterator[Metric]:
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
        totals = counters.read(self._queue.redis)
        for name, (metric, description, label, values) in COUNTED.items():
            family = CounterMetricFamily(metric, description, labels=[label] if label else [])
            for value in values or [""]:
                family.add_metric([value] if label else [], totals.get((name, value), 0.0))
            yield family

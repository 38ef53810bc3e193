"""The reaper: recovers only what stays lost, and clears the disk of what nobody has any more."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from service.artifacts import ArtifactStore
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.jobs import JobSpec, JobStatus
from service.queue import JobQueue
from service.reaper import Reaper
from service.records import new_job_id
from tests.live import spec, wait_until


def test_a_job_is_recovered_when_it_is_lost_at_two_looks(redis: EmbeddedRedis, tmp_path: Path) -> None:
    queue = JobQueue(connect(redis.url), timedelta(days=1))
    reaper = Reaper(queue, ArtifactStore(tmp_path / "store"), timedelta(days=1))
    job_id = queue.create(new_job_id(), JobSpec.parse(spec())).id
    attempt = queue.start(job_id)
    queue.redis.delete(f"c2i:job:{job_id}:lease:1")
    reaper.look()
    assert queue.status(job_id) is JobStatus.RUNNING
    queue.renew_lease(job_id, attempt)  # its worker was only slow
    reaper.look()
    queue.redis.delete(f"c2i:job:{job_id}:lease:1")
    reaper.look()
    assert queue.status(job_id) is JobStatus.RUNNING
    reaper.look()
    assert queue.status(job_id) is JobStatus.QUEUED
    queue.redis.close()


def test_no_lease_that_lapsed_while_redis_was_away_costs_a_job_its_attempt(
    redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.reaper.DOUBT_SECONDS", 60.0)  # however long the start of Redis and the looks take
    queue = JobQueue(connect(redis.url, patient=False), timedelta(days=1))
    reaper = Reaper(queue, ArtifactStore(tmp_path / "store"), timedelta(days=1))
    job_id = queue.create(new_job_id(), JobSpec.parse(spec())).id
    queue.start(job_id)
    redis.stop()
    with pytest.raises(RedisError):
        reaper.look()
    redis.start()
    queue.redis.delete(f"c2i:job:{job_id}:lease:1")
    for _ in range(3):
        reaper.look()
    assert queue.status(job_id) is JobStatus.RUNNING
    assert reaper._doubts_until < time.monotonic() + 60, "the doubt ends"
    monkeypatch.setattr(reaper, "_doubts_until", time.monotonic())

    def queued() -> bool:
        reaper.look()
        return queue.status(job_id) is JobStatus.QUEUED

    wait_until(queued, 10, "a job whose worker does not come back is given back after all")
    queue.redis.close()


def test_what_seems_lost_is_looked_at_again_before_the_next_round(
    redis: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.reaper.LOOK_SECONDS", 60.0)
    queue = JobQueue(connect(redis.url), timedelta(days=1))
    job_id = queue.create(new_job_id(), JobSpec.parse(spec())).id
    queue.start(job_id)
    queue.redis.delete(f"c2i:job:{job_id}:lease:1")
    reaper = Reaper(queue, ArtifactStore(tmp_path / "store"), timedelta(days=1))
    reaper.start()
    wait_until(lambda: queue.status(job_id) is JobStatus.QUEUED, 10, "the job is given back")
    reaper.stop()
    queue.redis.close()

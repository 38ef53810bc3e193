"""The reaper: recovers only what stays lost, and clears the disk of what nobody has any more."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from service.artifacts import ArtifactStore
from service.embedded import EmbeddedRedis
from service.jobs import JobSpec, JobStatus
from service.queue import JobQueue, connect, new_job_id
from service.reaper import Reaper
from tests.live import spec
from tests.stand_in import make_report


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


def test_what_expired_or_was_killed_leaves_the_disk_and_the_rest_stays(redis: EmbeddedRedis, tmp_path: Path) -> None:
    queue = JobQueue(connect(redis.url), timedelta(days=1))
    store = ArtifactStore(tmp_path / "store")
    given = JobSpec.parse(spec())
    running, done, expired = (new_job_id() for _ in range(3))
    for job_id in (running, done, expired):
        store.put_input(job_id, given)
        queue.create(job_id, given)
        attempt = queue.start(job_id)
        (tmp_path / "store" / "work" / f"{job_id}.{attempt}").mkdir()
    for job_id in (done, expired):
        with store.workspace(job_id, 1) as out:
            (out / "file").write_text(job_id)
            store.publish(job_id, 1, out)
        queue.succeed(job_id, 1, make_report(given).brief())
    (tmp_path / "store" / "work" / f"{done}.7").mkdir()
    queue.redis.delete(f"c2i:job:{expired}")

    Reaper(queue, store, timedelta(days=1)).clean()
    assert store.older_than(timedelta(0)).count(expired) == 1, "files of a job that is lost by mistake stay for its TTL"
    Reaper(queue, store, timedelta(0)).clean()
    assert sorted(store.older_than(timedelta(0))) == sorted([running, done])
    assert store.workspaces() == {(running, 1)}
    assert [file.path for file in store.files(done, 1)] == ["file"]
    assert len(list((tmp_path / "store" / "blobs").glob("*/*"))) == 1
    queue.redis.close()

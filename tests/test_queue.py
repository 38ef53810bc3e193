"""Job records: one transaction a change, stale attempts refused, nothing kept for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import Conflict, JobNotFound, NotFound, UnusableModel
from service.jobs import JobSpec, JobStatus, Progress, Stage
from service.queue import MAX_CRASHES, JobQueue
from service.records import new_job_id
from tests.live import spec
from tests.stand_in import make_report

SPEC = JobSpec.parse(spec())
RESULT = make_report(SPEC).brief()


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), timedelta(days=1))
    yield made
    made.redis.close()


def create(queue: JobQueue) -> str:
    return queue.create(new_job_id(), SPEC).id


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_job_id() for _ in range(1000)]
    assert [one[:14] for one in ids] == sorted(one[:14] for one in ids)
    assert len(set(ids)) == 1000


def test_jobs_wait_in_order_and_know_their_place(queue: JobQueue) -> None:
    ids = [create(queue) for _ in range(3)]
    assert [queue.get(job_id).progress.queue_position for job_id in ids] == [1, 2, 3]
    queue.cancel(ids[1])
    assert queue.get(ids[2]).progress.queue_position == 2
    assert queue.start(ids[0]) == 1
    assert queue.get(ids[0]).progress.queue_position is None
    assert queue.get(ids[2]).progress.queue_position == 1


def test_pages_go_from_the_newest_to_the_oldest_and_skip_what_expired(queue: JobQueue) -> None:
    ids = [create(queue) for _ in range(7)]
    newest = sorted(ids, reverse=True)
    assert [job.id for job in queue.list_jobs(3)] == newest[:3]
    assert [job.id for job in queue.list_jobs(3, newest[2])] == newest[3:6]
    queue.redis.delete(f"c2i:job:{newest[4]}")
    assert [job.id for job in queue.list_jobs(10)] == newest[:4] + newest[5:]
    assert queue.redis.zcard("c2i:jobs") == 6


def test_only_one_of_many_workers_starts_a_job(queue: JobQueue) -> None:
    job_id = create(queue)

    def start(_: int) -> int:
        try:
            return queue.start(job_id)
        except Conflict:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(start, range(8))) == [0] * 7 + [1]


def test_a_stale_attempt_can_write_nothing(queue: JobQueue) -> None:
    job_id = create(queue)
    first = queue.start(job_id)
    queue.give_back(job_id, first, "test", crashed=True)
    second = queue.start(job_id)
    assert (first, second) == (1, 2)
    before = queue.get(job_id)
    late: list[Callable[[], None]] = [
        lambda: queue.progress(job_id, first, Progress(percent=99), "late"),
        lambda: queue.succeed(job_id, first, RESULT),
        lambda: queue.fail(job_id, first, UnusableModel("late")),
        lambda: queue.give_back(job_id, first, "late", crashed=True),
        lambda: queue.cancelled(job_id, first),
    ]
    for write in late:
        with pytest.raises(Conflict):
            write()
    assert queue.attempt_status(job_id, first) is None
    assert queue.get(job_id) == before


def test_success_and_cancelling_at_once_have_one_winner(queue: JobQueue) -> None:
    for _ in range(20):
        job_id = create(queue)
        attempt = queue.start(job_id)

        def succeed(job_id: str = job_id, attempt: int = attempt) -> bool:
            try:
                queue.succeed(job_id, attempt, RESULT)
            except Conflict:
                return False
            return True

        def cancel(job_id: str = job_id) -> bool:
            try:
                queue.cancel(job_id)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            won = [pool.submit(succeed), pool.submit(cancel)]
            assert [future.result() for future in won].count(True) == 1
        expected = JobStatus.SUCCEEDED if won[0].result() else JobStatus.CANCELLING
        assert queue.status(job_id) is expected


def test_crashes_are_counted_and_hand_backs_are_not(queue: JobQueue) -> None:
    job_id = create(queue)
    for _ in range(5):
        queue.give_back(job_id, queue.start(job_id), "stopped", crashed=False)
    for crash in range(MAX_CRASHES):
        assert queue.status(job_id) is JobStatus.QUEUED
        queue.give_back(job_id, queue.start(job_id), f"crash {crash}", crashed=True)
    job = queue.get(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == "worker_died"


def test_a_job_given_back_goes_before_all_others(queue: JobQueue) -> None:
    first, second = create(queue), create(queue)
    queue.give_back(first, queue.start(first), "stopped", crashed=False)
    assert queue.get(first).progress.queue_position == 1
    assert queue.get(second).progress.queue_position == 2


def test_a_lost_job_is_found_and_recovered(queue: JobQueue) -> None:
    running, waiting, cancelling, fine = (create(queue) for _ in range(4))
    queue.start(running)
    queue.start(cancelling)
    queue.cancel(cancelling)
    assert queue.find_lost() == {}
    # The workers are gone, and one of them had taken a delivery and not begun.
    queue.redis.delete(f"c2i:job:{running}:lease:1", f"c2i:job:{cancelling}:lease:1")
    queue.redis.lmove("rq:queue:c2i", "rq:queue:c2i:intermediate", "LEFT", "RIGHT")
    assert queue.find_lost() == {running: 1, cancelling: 1, waiting: 0}
    for job_id, attempt in queue.find_lost().items():
        queue.recover(job_id, attempt)
    assert queue.find_lost() == {}
    statuses = [queue.status(job_id) for job_id in (running, waiting, cancelling, fine)]
    assert statuses == [JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.QUEUED]
    assert queue.redis.llen("rq:queue:c2i:intermediate") == 0
    assert sorted(queue.get(job_id).progress.queue_position or 0 for job_id in (running, waiting, fine)) == [1, 2, 3]


def test_events_grow_and_are_read_on_from_any_of_them(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.transactions.MAX_EVENTS", 20)
    job_id = create(queue)
    attempt = queue.start(job_id)
    for percent in range(0, 100, 25):
        queue.progress(job_id, attempt, Progress(stage=Stage.SEARCHING, percent=percent), f"at {percent}")
    events = queue.events(job_id)
    assert [event.message for event in events] == ["queued", "attempt 1 began", "at 0", "at 25", "at 50", "at 75"]
    assert queue.events(job_id, events[3].id) == events[4:]
    assert queue.events(job_id, events[-1].id) == []
    for _ in range(30):
        queue.progress(job_id, attempt, Progress(), "again")
    assert len(queue.events(job_id)) == 20


def test_what_has_ended_is_kept_for_its_time_and_then_leaves_no_key(queue: JobQueue) -> None:
    done, failed, cancelled = create(queue), create(queue), create(queue)
    queue.succeed(done, queue.start(done), RESULT)
    queue.fail(failed, queue.start(failed), UnusableModel("no"))
    queue.cancel(cancelled)
    queue.expire()
    assert {job.id for job in queue.list_jobs(10)} == {done, failed, cancelled}
    short = JobQueue(queue.redis, timedelta(0))
    short.expire()
    assert sorted(short.deleted()) == sorted([done, failed, cancelled])
    for job_id in short.deleted():
        short.files_deleted(job_id)
    assert queue.redis.keys("c2i:*") == [b"c2i:counters"]
    assert set(queue.redis.keys("*")) <= {b"rq:queues", b"c2i:counters"}


def test_what_has_ended_does_not_change(queue: JobQueue) -> None:
    job_id = create(queue)
    attempt = queue.start(job_id)
    queue.succeed(job_id, attempt, RESULT)
    before = queue.get(job_id), queue.events(job_id)
    queue.succeed(job_id, attempt, RESULT)  # a worker whose first answer was lost
    queue.create(job_id, SPEC)  # an API whose first answer was lost
    assert (queue.get(job_id), queue.events(job_id)) == before
    with pytest.raises(Conflict):
        queue.cancel(job_id)
    with pytest.raises(Conflict):
        queue.fail(job_id, attempt, UnusableModel("late"))
    with pytest.raises(Conflict):
        queue.start(job_id)
    assert queue.get(job_id).progress.percent == 100


def test_a_job_that_runs_cannot_be_deleted(queue: JobQueue) -> None:
    job_id = create(queue)
    with pytest.raises(Conflict, match="cancel it first"):
        queue.delete(job_id)
    queue.cancel(job_id)
    queue.delete(job_id)
    for ask in (queue.get, queue.status, queue.events, queue.cancel, queue.delete, queue.start):
        with pytest.raises(JobNotFound):
            ask(job_id)
    assert issubclass(JobNotFound, NotFound)


def test_only_the_jobs_id_goes_through_rq(queue: JobQueue) -> None:
    job_id = create(queue)
    delivery = queue.redis.hgetall(f"rq:job:{job_id}-1")
    assert "Item 0" not in str(delivery)
    job = queue.deliveries.fetch_job(f"{job_id}-1")
    assert job is not None
    assert job.args == [job_id]

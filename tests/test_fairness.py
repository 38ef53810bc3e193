"""Whose job is next, on a real Redis: keys take turns, and one key's thousand jobs hold up nobody's first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.embedded import EmbeddedRedis
from service.errors import InternalError
from service.fairness import CLOCK, ORDER, Held
from service.jobs import JobSpec, JobStatus
from service.limits import QueueLimits
from service.queue import JobQueue, connect, new_job_id
from tests import tiny
from tests.live import redis as new_redis

SPEC = JobSpec.parse({"model": "tiny-llama", "examples": tiny.learnable_examples(12)})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    started = new_redis(tmp_path_factory.mktemp("redis"))
    yield started
    started.stop()


@pytest.fixture
def queue(server: EmbeddedRedis) -> JobQueue:
    return make_queue(server)


def make_queue(server: EmbeddedRedis, limits: QueueLimits | None = None) -> JobQueue:
    """An empty one."""
    made = JobQueue(connect(server.url), timedelta(days=1), limits)
    made.redis.flushall()
    return made


def submit(queue: JobQueue, owner: str) -> str:
    """A job of this owner; its ID."""
    return queue.create(new_job_id(), SPEC, owner).id


def pop(queue: JobQueue) -> str | None:
    """What rq does for a worker: the head of the list, noted as on its way."""
    delivery = queue.redis.lmove(queue.deliveries.key, queue.deliveries.intermediate_queue_key, "LEFT", "RIGHT")
    return delivery.decode().rpartition("-")[0] if isinstance(delivery, bytes) else None


def start_all(queue: JobQueue) -> list[str]:
    """Start job after job; their IDs in that order."""
    started = []
    while job_id := pop(queue):
        queue.start(job_id)
        started.append(job_id)
    return started


def test_one_keys_thousand_jobs_do_not_hold_up_anothers_first(queue: JobQueue) -> None:
    of_a = [submit(queue, "a") for _ in range(300)]
    first, second = submit(queue, "b"), submit(queue, "b")
    assert queue.get(first).progress.queue_position in (1, 2)
    assert queue.get(second).progress.queue_position in (3, 4)
    assert [queue.get(of_a[k]).progress.queue_position for k in (0, 299)] == [1, 302]
    # So it is when many of the first key's have begun.
    for _ in range(100):
        queue.start(pop(queue) or "")
    late = submit(queue, "c")
    assert queue.get(late).progress.queue_position in (1, 2)


def test_a_single_key_is_served_first_come_first_served_and_leaves_nothing(queue: JobQueue) -> None:
    jobs = [submit(queue, "") for _ in range(20)]
    assert start_all(queue) == jobs
    assert not queue.redis.exists(ORDER, CLOCK)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["submit a", "submit b", "submit c", "start", "cancel"]), max_size=40))
def test_whatever_happens_nothing_is_lost_and_a_keys_jobs_keep_order(server: EmbeddedRedis, steps: list[str]) -> None:
    queue = make_queue(server)
    waiting: list[tuple[str, str]] = []  # job and owner, in the order of submission

    for step in steps:
        if step.startswith("submit"):
            owner = step[-1]
            waiting.append((submit(queue, owner), owner))
        elif step == "start" and (job_id := pop(queue)):
            assert queue.start(job_id) == 1
            waiting = [one for one in waiting if one[0] != job_id]
        elif step == "cancel" and waiting:
            queue.cancel(waiting.pop(0)[0])
    owners = dict(waiting)
    rest = start_all(queue)
    assert sorted(rest) == sorted(owners), "nothing is lost, nothing comes twice"
    for owner in "abc":
        mine = [job_id for job_id in rest if owners[job_id] == owner]
        assert mine == [job_id for job_id, theirs in waiting if theirs == owner], "in the order of submission"
    assert not queue.redis.exists(ORDER, CLOCK)


def test_two_keys_with_many_jobs_each_have_half_of_the_starts(queue: JobQueue) -> None:
    for _ in range(50):
        submit(queue, "a")
    for _ in range(50):
        submit(queue, "b")
    owners = [queue.redis.hget(f"c2i:job:{job_id}", "owner") for job_id in start_all(queue)]
    assert all(abs(owners[:k].count(b"a") - owners[:k].count(b"b")) <= 1 for k in range(101))


def test_a_job_that_had_begun_is_the_next_whoever_waits(queue: JobQueue) -> None:
    begun = submit(queue, "a")
    queue.start(pop(queue) or "")
    for owner in "abc":
        submit(queue, owner)
    queue.give_back(begun, 1, "its worker was stopped", crashed=False)
    assert queue.get(begun).progress.queue_position == 1
    fresh = submit(queue, "d")
    assert queue.get(fresh).progress.queue_position == 5, "behind the other keys' first jobs"
    assert pop(queue) == begun


def test_a_key_at_its_limit_waits_for_its_own_jobs_and_holds_up_nobody(server: EmbeddedRedis) -> None:
    queue = make_queue(server, QueueLimits(running=1))
    first, second, third = (submit(queue, "a") for _ in range(3))
    other = submit(queue, "b")
    started = []
    while job_id := pop(queue):
        try:
            queue.start(job_id)
        except Held:
            continue
        started.append(job_id)
    assert started == [first, other]
    assert [queue.get(job_id).status for job_id in (second, third)] == [JobStatus.QUEUED] * 2
    assert [queue.get(job_id).progress.queue_position for job_id in (second, third)] == [1, 2]
    assert queue.find_lost() == {}
    queue.cancel(second)
    queue.fail(first, 1, InternalError("a fault"))
    assert pop(queue) == third, "released by the end of the first"
    assert queue.start(third) == 1


def test_a_held_job_whose_release_was_lost_is_found(server: EmbeddedRedis) -> None:
    queue = make_queue(server, QueueLimits(running=1))
    first, second = submit(queue, "a"), submit(queue, "a")
    queue.start(pop(queue) or "")
    with pytest.raises(Held):
        queue.start(pop(queue) or "")
    queue.redis.srem("c2i:running:a", first)
    assert queue.find_lost() == {second: 0}
    queue.recover(second, 0)
    assert pop(queue) == second


def test_ten_thousand_waiting_jobs_cost_a_submission_little(queue: JobQueue) -> None:
    """The list is searched by Redis itself: milliseconds, whoever waits."""
    with queue.redis.pipeline(transaction=False) as pipe:
        for k in range(10_000):
            pipe.rpush(queue.deliveries.key, f"waiting-{k}")
            pipe.zadd(ORDER, {f"waiting-{k}": k})
        pipe.execute()
    before = time.perf_counter()
    for _ in range(20):
        submit(queue, "b")
    assert (time.perf_counter() - before) / 20 < 0.05

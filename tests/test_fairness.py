"""Whose job is next, on a real Redis: keys take turns, and one key's thousand jobs hold up nobody's first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import InternalError
from service.fairness import CLOCK, ORDER, Held
from service.jobs import JobSpec, JobStatus
from service.keys import KeyStore, Scope
from service.limits import QueueLimits
from service.queue import JobQueue
from service.records import new_job_id
from tests import tiny
from tests.live import Api, WorkerProcess, install, spec, wait_until
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
    of_a = [submit(queue, "a") for _ in range(150)]
    first, second = submit(queue, "b"), submit(queue, "b")
    assert queue.get(first).progress.queue_position in (1, 2)
    assert queue.get(second).progress.queue_position in (3, 4)
    assert [queue.get(of_a[k]).progress.queue_position for k in (0, 149)] == [1, 152]
    # So it is when many of the first key's have begun.
    for _ in range(50):
        queue.start(pop(queue) or "")
    late = submit(queue, "c")
    assert queue.get(late).progress.queue_position in (1, 2)


def test_a_single_key_is_served_first_come_first_served_and_leaves_nothing(queue: JobQueue) -> None:
    jobs = [submit(queue, "") for _ in range(20)]
    assert start_all(queue) == jobs
    assert not queue.redis.exists(ORDER, CLOCK)


# Each run is hundreds of transactions.
NO_SHRINKING = (Phase.explicit, Phase.generate)
STEPS = ["submit a", "submit a", "submit b", "start", "start", "end", "cancel", "give back"]


def start_next(queue: JobQueue) -> str | None:
    """What a worker does that looks for a job: the one that it starts."""
    while job_id := pop(queue):
        try:
            queue.start(job_id)
        except Held:
            continue
        return job_id
    return None


@settings(
    max_examples=20, deadline=None, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([1, 2, None]),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9)), min_size=20, max_size=40),
)
def test_whatever_happens_nothing_is_lost_and_a_keys_jobs_keep_order(
    server: EmbeddedRedis, limit: int | None, steps: list[tuple[str, int]]
) -> None:
    queue = make_queue(server, QueueLimits(running=limit))
    owners: dict[str, str] = {}
    waiting: list[str] = []  # in the order in which each key's are to start
    running: list[str] = []

    def start() -> bool:
        job_id = start_next(queue)
        free = [one for one in waiting if limit is None or running_of(owners[one]) < limit]
        if job_id is None:
            assert not free, "no worker is idle while a job may start"
            return False
        assert job_id in free
        mine = [one for one in waiting if owners[one] == owners[job_id]]
        assert job_id == mine[0], "in the order of submission, after what had begun before"
        waiting.remove(job_id)
        running.append(job_id)
        return True

    def running_of(owner: str) -> int:
        return sum(owners[one] == owner for one in running)

    def end(job_id: str) -> None:
        queue.fail(job_id, queue.get(job_id).attempt, InternalError("a fault"))
        running.remove(job_id)

    for step, k in [*steps, *[("end", 0)] * 50]:
        if step.startswith("submit"):
            job_id = submit(queue, step[-1])
            owners[job_id] = step[-1]
            waiting.append(job_id)
        elif step == "start":
            start()
        elif step == "cancel" and waiting:
            queue.cancel(waiting.pop(k % len(waiting)))
        elif step == "end" and running:
            end(running[k % len(running)])
        elif step == "give back" and len(running) == 1:
            queue.give_back(running[0], queue.get(running[0]).attempt, "its worker was stopped", crashed=False)
            waiting.insert(0, running.pop())
    while start():
        if limit is not None:
            end(running[0])
    for job_id in list(running):
        end(job_id)
    assert not waiting
    keys = sorted(key.decode() for key in queue.redis.scan_iter("c2i:*"))
    assert not [key for key in keys if key.startswith(("c2i:order", "c2i:waiting", "c2i:held", "c2i:running"))]


def test_two_keys_with_many_jobs_each_have_half_of_the_starts(queue: JobQueue) -> None:
    for _ in range(25):
        submit(queue, "a")
    for _ in range(25):
        submit(queue, "b")
    owners = [queue.redis.hget(f"c2i:job:{job_id}", "owner") for job_id in start_all(queue)]
    assert all(abs(owners[:k].count(b"a") - owners[:k].count(b"b")) <= 1 for k in range(51))


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
    assert [start_next(queue) for _ in range(3)] == [first, other, None]
    assert [queue.get(job_id).status for job_id in (second, third)] == [JobStatus.QUEUED] * 2
    assert [queue.get(job_id).progress.queue_position for job_id in (second, third)] == [1, 2]
    assert queue.find_lost() == {}
    queue.cancel(second)
    queue.fail(first, 1, InternalError("a fault"))
    assert start_next(queue) == third, "released by the end of the first"


def test_a_key_gathers_no_claims_while_it_is_at_its_limit(server: EmbeddedRedis) -> None:
    """Else its held jobs, one after the other, would all be the next."""
    queue = make_queue(server, QueueLimits(running=1))
    running = submit(queue, "a")
    for _ in range(20):
        submit(queue, "a")
    assert start_next(queue) == running
    blocker = submit(queue, "b")
    assert start_next(queue) == blocker
    assert start_next(queue) is None, "all others of a are held"
    late, later = submit(queue, "c"), submit(queue, "d")
    queue.fail(running, 1, InternalError("a fault"))
    assert [queue.get(job_id).progress.queue_position for job_id in (late, later)] == [1, 2]
    assert start_next(queue) == late


def test_a_job_that_arrives_while_older_ones_are_held_starts_after_them(server: EmbeddedRedis) -> None:
    queue = make_queue(server, QueueLimits(running=1))
    jobs = [submit(queue, "a") for _ in range(4)]
    assert [start_next(queue), start_next(queue)] == [jobs[0], None]
    jobs.append(submit(queue, "a"))
    assert queue.get(jobs[4]).progress.queue_position == 4
    for job_id, following in zip(jobs, [*jobs[1:], None], strict=True):
        queue.fail(job_id, 1, InternalError("a fault"))
        assert start_next(queue) == following


def test_older_jobs_that_are_held_come_first_also_where_other_keys_have_moved_the_clock(server: EmbeddedRedis) -> None:
    queue = make_queue(server, QueueLimits(running=1))
    running, held = submit(queue, "a"), submit(queue, "a")
    for _ in range(8):
        submit(queue, "b")
    assert start_next(queue) == running
    for _ in range(6):  # held among these
        of_b = start_next(queue)
        queue.fail(of_b or "", 1, InternalError("a fault"))
    late = submit(queue, "a")
    queue.fail(running, 1, InternalError("a fault"))
    while (job_id := start_next(queue)) and job_id not in (held, late):
        queue.fail(job_id, 1, InternalError("a fault"))
    assert job_id == held


def test_cancelled_jobs_do_not_count_against_their_key(queue: JobQueue) -> None:
    for _ in range(30):
        submit(queue, "b")
    for job_id in [submit(queue, "a") for _ in range(30)]:
        queue.cancel(job_id)
    assert queue.get(submit(queue, "a")).progress.queue_position == 2


def test_a_worker_passes_over_a_keys_thousands_in_one_step(server: EmbeddedRedis) -> None:
    queue = make_queue(server, QueueLimits(running=1))
    jobs = [submit(queue, "a") for _ in range(151)]
    other = submit(queue, "b")
    assert start_next(queue) == jobs[0]
    assert start_next(queue) == other
    popped = []
    while job_id := pop(queue):
        popped.append(job_id)
        with pytest.raises(Held):
            queue.start(job_id)
    assert popped == [jobs[1]]
    assert queue.find_lost() == {}


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


def test_workers_start_no_more_of_a_keys_jobs_than_it_may_have_and_go_on_with_the_others(
    tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    install(tiny_models("llama"), tmp_path)
    server = new_redis(tmp_path)
    env = {"C2I_MAX_RUNNING_JOBS": "1"}
    workers = [WorkerProcess(tmp_path, server.url, env) for _ in range(2)]
    api = Api(tmp_path, server.url, max_running_jobs=1, require_keys=True)
    try:
        keys = KeyStore(api.service.queue.redis)
        scopes = frozenset({Scope.READ, Scope.SUBMIT})
        a, b = ({"Authorization": f"Bearer {keys.create(name, scopes)[0]}"} for name in "ab")

        def post(key: dict[str, str], do: str) -> str:
            answer = api.http.post("/v1/jobs", json=spec(metadata={"do": do}), headers=key)
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        def job(key: dict[str, str], job_id: str) -> dict[str, Any]:
            return dict(api.http.get(f"/v1/jobs/{job_id}", headers=key).json())

        blocking = post(a, "block")
        wait_until(lambda: job(a, blocking)["status"] == "running", 30, "the first is running")
        rest = [post(a, "publish") for _ in range(3)]
        of_b = post(b, "publish")
        wait_until(lambda: job(b, of_b)["status"] == "succeeded", 30, "the other key's job is done")
        assert [job(a, job_id)["status"] for job_id in rest] == ["queued"] * 3
        api.http.post(f"/v1/jobs/{blocking}/cancel", headers=a)
        wait_until(lambda: all(job(a, one)["status"] == "succeeded" for one in rest), 30, "its others have run")
        began = [job(a, job_id)["started_at"] for job_id in rest]
        ended = [job(a, job_id)["finished_at"] for job_id in rest]
        assert all(end <= begin for end, begin in zip(ended, began[1:], strict=False)), "one at a time, in order"
    finally:
        for worker in workers:
            worker.terminate()
        api.stop()
        server.stop()

"""Workers announce themselves while they live, say what they do, and are forgotten when they are gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from service import workforce
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import Unavailable
from service.workforce import WorkerInfo, WorkerState, list_workers
from tests.live import Api, WorkerProcess, wait_until
from workers.machine import Machine, in_child, measure


def test_a_worker_is_idle_then_busy_with_a_job_then_idle_then_gone(api: Api, worker: WorkerProcess) -> None:
    redis = api.service.queue.redis
    idle = wait_until(lambda: list_workers(redis), 30, "a worker is there")[0]
    assert (idle.pid, idle.state, idle.job_id) == (worker.pid, WorkerState.IDLE, None)
    assert (idle.device, idle.threads, idle.speed) == ("cpu", 1, 10.0)  # the stand-in's
    job_id = api.submit(metadata={"do": "block"})
    busy = wait_until(
        lambda: found[0] if (found := list_workers(redis))[0].job_id else None, 10, "the worker announces its job"
    )
    assert (busy.id, busy.state, busy.job_id, busy.attempt) == (idle.id, WorkerState.BUSY, job_id, 1)
    assert busy.seen_at > idle.seen_at
    api.http.post(f"/v1/jobs/{job_id}/cancel")
    api.job(job_id, wait=10)
    wait_until(lambda: list_workers(redis)[0].state is WorkerState.IDLE, 10, "the worker is idle again")
    assert list_workers(redis)[0].job_id is None
    assert worker.terminate() == 0
    assert list_workers(redis) == []


def test_what_a_worker_leaves_when_it_is_killed_lapses(redis: EmbeddedRedis) -> None:
    client = connect(redis.url)
    now = datetime.now(UTC)
    first = WorkerInfo(
        id="worker_a", host="h", pid=1, version="1", device="cpu", threads=1, speed=None, started_at=now, seen_at=now
    )
    second = first.model_copy(update={"id": "worker_b", "started_at": now - timedelta(seconds=1)})
    for info in (first, second):
        workforce.heartbeat(client, info)
    assert [info.id for info in list_workers(client)] == ["worker_b", "worker_a"]
    assert 0 < client.ttl("c2i:worker:worker_a") <= workforce.LAPSE_SECONDS
    assert 0 < client.ttl("c2i:workers") <= workforce.LAPSE_SECONDS
    client.delete("c2i:worker:worker_a")  # as it lapses
    assert [info.id for info in list_workers(client)] == ["worker_b"]
    client.close()


def test_a_machine_is_measured_in_a_process_of_its_own(one_thread: None) -> None:
    before = psutil.Process().num_threads()
    machine = in_child(measure)
    assert machine.threads == 1
    assert machine.speed is not None
    assert 1 < machine.speed < 1e6
    assert psutil.Process().num_threads() == before
    assert psutil.Process().children() == []


def test_a_worker_that_cannot_compute_says_why(tmp_path: Path) -> None:
    def broken() -> Machine:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    def dead() -> Machine:
        os._exit(3)

    with pytest.raises(Unavailable, match=r"cannot compute.*libcudart\.so\.12"):
        in_child(broken)
    with pytest.raises(Unavailable, match="ended with 3"):
        in_child(dead)

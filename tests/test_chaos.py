"""The faults' harness: a few blows to a real service, and each of its checks fires on what it is to find."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service.artifacts import ArtifactStore
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.jobs import JobSpec
from service.queue import JobQueue
from service.records import new_job_id
from tests.chaos.faults import FAULTS
from tests.chaos.invariants import (
    check_artifacts,
    check_end,
    find_stray_files,
    find_stray_processes,
    find_strays_beside,
)
from tests.chaos.keys import find_stray_keys
from tests.chaos.run import Round, deal, run, table
from tests.chaos.watch import Watcher
from tests.chaos.world import MARK, Accepted
from tests.live import Api, WorkerProcess, spec, wait_until

JOB = "job_0123456789abcdefghjk"
OTHER = "job_0123456789abcdefghjz"


def test_blows_to_a_real_service_cost_no_job() -> None:
    rounds = run(2, seed=1, parallel=1, kinds=["kill_child", "kill_redis"], tell=lambda _: None)
    assert [result.problems for result in rounds] == [[], []]
    assert all(result.jobs and result.recovery is not None for result in rounds)


def test_every_kind_is_dealt_equally_often_and_the_same_seed_deals_the_same() -> None:
    dealt = deal(2 * len(FAULTS), list(FAULTS), seed=3)
    assert sorted(kind for _, kind in dealt) == sorted([*FAULTS, *FAULTS])
    assert dealt == deal(2 * len(FAULTS), list(FAULTS), seed=3)
    assert dealt != deal(2 * len(FAULTS), list(FAULTS), seed=4)


def test_the_table_counts_what_went_wrong() -> None:
    well = Round(1, "kill_api", jobs=2, recovery=1.0)
    wrong = Round(2, "kill_api", jobs=3, recovery=40.0, lost=1, problems=["a job is gone"])
    skipped = Round(3, "fill_disk", skipped="no")
    assert table([well, wrong, skipped]).splitlines()[2:] == [
        "| kill api | 2 | 1 | 5 | 1 | 0 | 20.5 s | 40.0 s | 1 |",
        "| fill disk | skipped: no | | | | | | | |",
        "| all | 2 | 1 | 5 | 1 | 0 | 20.5 s | 40.0 s | 1 |",
    ]


# --- processes ---------------------------------------------------------------------------------------------------


def process(name: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that bears the name."""
    script = f"open('/proc/self/comm', 'w').write('{name}'); print(flush=True); import time; time.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, **(env or {})})
    assert child.stdout
    child.stdout.readline()
    child.stdout.close()
    return child


def test_two_processes_on_one_job_are_seen_and_two_jobs_are_none() -> None:
    watcher = Watcher(lambda: [os.getpid()])
    children = [process(JOB[-15:]), process(OTHER[-15:])]
    try:
        watcher.look()
        assert watcher.alive() == {JOB[-15:]: [children[0].pid], OTHER[-15:]: [children[1].pid]}
        assert watcher.doubled == {}
        children.append(process(JOB[-15:]))
        watcher.look()
        assert watcher.doubled == {JOB[-15:]: {children[0].pid, children[2].pid}}
    finally:
        for child in children:
            child.kill()
            child.wait()
    watcher.look()
    assert watcher.alive() == {}


def test_the_process_of_a_real_job_bears_its_name(api: Api, worker: WorkerProcess) -> None:
    watcher = Watcher(lambda: [worker.pid])
    job_id = api.submit(metadata={"do": "block"})

    def seen() -> list[int] | None:
        watcher.look()
        return watcher.alive().get(Accepted(job_id, 0).name)

    pid = wait_until(seen, 30, "its process is seen")[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: (again := seen()) and again != [pid], 30, "that of its second attempt is seen")
    assert watcher.doubled == {}


def test_a_process_that_was_left_is_found() -> None:
    child = process("left", env={MARK: "a-world"})
    try:
        assert find_stray_processes("a-world", [child.pid]) == []
        (found,) = find_stray_processes("a-world", [])
        assert str(child.pid) in found
    finally:
        child.kill()
        child.wait()


# --- Redis -------------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), timedelta(days=1))
    yield made
    made.redis.close()


def test_a_service_in_order_has_no_stray_keys(queue: JobQueue) -> None:
    waiting, running, ended, deleted = (queue.create(new_job_id(), JobSpec.parse(spec())).id for _ in range(4))
    queue.cancel(ended)
    queue.cancel(deleted)
    queue.delete(deleted)
    queue.files_deleted(deleted)
    queue.start(running)
    assert queue.get(waiting).progress.queue_position == 1
    assert find_stray_keys(queue.redis) == []


@pytest.mark.parametrize(
    ("leak", "found"),
    [
        (lambda redis, _: redis.set("c2i:forgotten", ""), "neither a TTL nor an owner"),
        (lambda redis, _: redis.set(f"c2i:job:{JOB}:lease:1", ""), "neither a TTL nor an owner"),
        (lambda redis, _: redis.xadd(f"c2i:job:{JOB}:events", {"a": "b"}), "has no job"),
        (lambda redis, _: redis.hset(f"rq:job:{JOB}-1", "a", "b"), "is of no waiting job"),
        (lambda redis, job_id: redis.hset(f"rq:job:{job_id}-7", "a", "b"), "is of no waiting job"),
        (lambda redis, _: redis.zadd("c2i:jobs", {JOB: 0}), f"c2i:jobs names {JOB}"),
        (lambda redis, job_id: redis.sadd("c2i:active", job_id), "c2i:active names"),
        (lambda redis, job_id: redis.srem("c2i:active", job_id), ""),
        (lambda redis, job_id: redis.zrem("c2i:ended", job_id), "c2i:ended lacks"),
        (lambda redis, job_id: redis.sadd("c2i:running:", job_id), "c2i:running: names"),
        (lambda redis, _: redis.lpush("rq:queue:c2i", f"{JOB}-1"), "rq:queue:c2i names"),
        (lambda redis, _: redis.lpush("rq:queue:c2i:intermediate", f"{JOB}-1"), "intermediate names"),
        (lambda redis, _: redis.sadd("c2i:deleted", JOB), "c2i:deleted names"),
        (lambda redis, _: redis.hset("c2i:order:clock", "now", "1"), "although nothing waits"),
    ],
)
def test_a_key_that_nobody_will_remove_is_found(queue: JobQueue, leak: Callable[[Redis, str], Any], found: str) -> None:
    job_id = queue.create(new_job_id(), JobSpec.parse(spec())).id
    queue.cancel(job_id)
    leak(queue.redis, job_id)
    told = find_stray_keys(queue.redis)
    assert len(told) == bool(found), told
    assert all(found in line for line in told)


# --- jobs --------------------------------------------------------------------------------------------------------


def record(status: str = "succeeded", attempt: int = 1, code: str | None = None) -> dict[str, Any]:
    error = {"code": code, "message": "words"} if code else None
    return {"status": status, "attempt": attempt, "error": error, "progress": {}}


def events(*messages: str, status: str = "succeeded") -> list[dict[str, str]]:
    told = [{"kind": "status", "status": "running", "message": message} for message in messages]
    return [*told, {"kind": "status", "status": status, "message": "its end"}]


BEGAN = "attempt 1 began"
AGAIN = ("queued again: its worker is gone", "attempt 2 began")
THIRD = ("queued again: its process was killed by SIGKILL", "attempt 3 began")


def test_a_job_may_end_well_or_fail_for_what_the_blow_explains() -> None:
    assert check_end(Accepted(JOB, 0), record(), events(BEGAN)) == []
    assert check_end(Accepted(JOB, 0), record(attempt=3), events(BEGAN, *AGAIN, *THIRD)) == []
    full = Accepted(JOB, 0, may_fail={"unavailable"})
    assert check_end(full, record("failed", code="unavailable"), events(BEGAN, status="failed")) == []
    cancelled = Accepted(JOB, 0, may_be_cancelled=True)
    assert check_end(cancelled, record("cancelled", 0), events(status="cancelled")) == []
    assert check_end(Accepted(JOB, 0, may_be_gone=True), None, []) == []


@pytest.mark.parametrize(
    ("record", "events", "found"),
    [
        (None, [], "is gone"),
        (record("running"), events(BEGAN)[:-1], "has not ended: running"),
        (record("cancelled"), events(BEGAN, status="cancelled"), "nobody asked for"),
        (record("failed", code="internal_error"), events(BEGAN, status="failed"), "internal_error"),
        (record(attempt=2), events(BEGAN), "counts its attempts"),
        (record(attempt=2), events(BEGAN, BEGAN), "counts its attempts"),
        (record(), [*events(BEGAN), *events()], "ended as ['succeeded', 'succeeded']"),
        (record(attempt=4), events(BEGAN, *AGAIN, *THIRD, THIRD[0], "attempt 4 began"), "after 3 crashes"),
    ],
)
def test_a_job_that_ends_otherwise_is_found(
    record: dict[str, Any] | None, events: list[dict[str, str]], found: str
) -> None:
    (told,) = check_end(Accepted(JOB, 0), record, events)
    assert found in told


def test_artifacts_that_are_not_what_they_say_are_found(api: Api, worker: WorkerProcess, data: Path) -> None:
    job_id = api.submit()
    assert api.job(job_id, wait=30)["status"] == "succeeded"
    found, adapter = check_artifacts(api.http, job_id, load=False)
    assert found == []
    assert len(adapter) == 64
    (told,) = check_artifacts(api.http, job_id, load=True)[0]  # the stand-in's model is none
    assert "does not load" in told
    blob = data / "artifacts" / "blobs" / adapter[:2] / adapter
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.write(b"\xff")
    (told,) = check_artifacts(api.http, job_id, load=False)[0]
    assert "adapter/adapter_model.safetensors is not what its manifest says" in told


# --- disk --------------------------------------------------------------------------------------------------------


def test_files_that_belong_to_nobody_are_found(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    folder = tmp_path / "artifacts"
    store.put_input(JOB, JobSpec.parse(spec()))
    with store.workspace(JOB, 1) as out:
        (out / "report.json").write_text("{}")
        assert find_stray_files(tmp_path, {JOB}) == [f"a workspace is left: {JOB}.1"]
        (file,) = store.publish(JOB, 1, out)
    assert find_stray_files(tmp_path, {JOB}) == []
    (told,) = find_stray_files(tmp_path, set())[:1]
    assert told.startswith("files of no job")
    half = folder / "jobs" / JOB / ".2.manifest.json.77"
    half.touch()
    (folder / "blobs" / "ab").mkdir(exist_ok=True)
    (folder / "blobs" / "ab" / "abcd").touch()
    with store.open(file) as stream:
        Path(stream.name).unlink()
    assert find_stray_files(tmp_path, {JOB}) == [
        f"half-written: {JOB}/.2.manifest.json.77",
        "a blob that no job names: abcd",
        f"a blob is missing: {file.sha256}",
    ]


def test_temporary_files_sockets_and_half_written_factors_are_found(tmp_path: Path) -> None:
    for name in ("tmp", "data/cache/spectra"):
        (tmp_path / name).mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as expected, socket.socket(socket.AF_UNIX) as other:
        expected.bind(str(tmp_path / "redis.sock"))
        assert find_strays_beside(tmp_path, tmp_path / "data", tmp_path / "tmp", ["redis.sock"]) == []
        other.bind(str(tmp_path / "other.sock"))
    (tmp_path / "tmp" / "tmpabc").touch()
    (tmp_path / "data" / "cache" / "spectra" / ".writing-abc").touch()
    assert find_strays_beside(tmp_path, tmp_path / "data", tmp_path / "tmp", ["redis.sock"]) == [
        "a temporary file is left: tmpabc",
        "half-written: cache/.writing-abc",
        "a socket is left: other.sock",
    ]

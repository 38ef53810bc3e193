"""Jobs in real processes: cancelled, killed, lost, handed back; whatever happens, one result and no leftovers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from service.queue import LEASE_SECONDS
from service.workforce import WorkerState, list_workers
from tests.live import Api, WorkerProcess, is_gone, wait_until


def test_a_job_succeeds_and_its_files_appear(api: Api, worker: WorkerProcess) -> None:
    job_id = api.submit()
    job = api.job(job_id, wait=30)
    assert job["status"] == "succeeded"
    assert job["attempt"] == 1
    assert job["progress"]["percent"] == 100
    assert job["result"]["verdict"] == "no significant improvement"
    files = api.http.get(f"/v1/jobs/{job_id}/files").json()["data"]
    assert [file["path"] for file in files] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "model/model.safetensors",
        "report.html",
        "report.json",
    ]
    kinds = [event["message"] for event in api.http.get(f"/v1/jobs/{job_id}/events").json()["data"]]
    assert kinds[:3] == ["queued", "attempt 1 began", "reading the model"]
    assert kinds[-1] == "no significant improvement"


def test_cancel_kills_a_running_job_in_two_seconds(api: Api, worker: WorkerProcess, data: Path) -> None:
    job_id = api.submit(metadata={"do": "block"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    processes = worker.children()
    assert len(processes) >= 2  # the job, and what it started
    began = time.monotonic()
    assert api.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    job = api.job(job_id, wait=10)
    took = time.monotonic() - began
    assert job["status"] == "cancelled"
    assert took < 2
    assert all(is_gone(process) for process in processes)
    assert list((data / "artifacts" / "work").iterdir()) == []
    assert list((data / "artifacts" / "blobs").rglob("*")) == []
    assert api.http.get(f"/v1/jobs/{job_id}/files").status_code == 409
    assert api.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    # The worker goes on.
    assert api.job(api.submit(), wait=30)["status"] == "succeeded"


def test_a_queued_job_is_cancelled_at_once_and_never_starts(api: Api, data: Path) -> None:
    job_id = api.submit()
    assert api.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    other = api.submit()
    assert api.job(other)["progress"]["queue_position"] == 1
    worker = WorkerProcess(data, redis_url(data))
    try:
        assert api.job(other, wait=30)["status"] == "succeeded"
    finally:
        worker.kill()
    assert api.job(job_id)["attempt"] == 0


def test_a_job_whose_process_is_killed_runs_again(api: Api, worker: WorkerProcess) -> None:
    job_id = api.submit(metadata={"do": "once"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    worker.children()[0].kill()
    job = api.job(job_id, wait=30)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)


def test_a_job_that_always_kills_its_process_fails_after_three_attempts(api: Api, worker: WorkerProcess) -> None:
    job = api.job(api.submit(metadata={"do": "die"}), wait=30)
    assert (job["status"], job["attempt"]) == ("failed", 3)
    assert job["error"]["code"] == "worker_died"
    assert "SIGKILL" in job["error"]["message"]
    assert "memory" in job["error"]["message"]


def test_errors_reach_the_user_in_words_and_secrets_do_not(api: Api, worker: WorkerProcess, data: Path) -> None:
    memory = api.job(api.submit(metadata={"do": "memory"}), wait=30)["error"]
    assert memory["code"] == "out_of_memory"
    bug = api.job(api.submit(metadata={"do": "bug"}), wait=30)["error"]
    assert bug["code"] == "internal_error"
    assert "secret" not in bug["message"]
    assert str(data) not in bug["message"]
    refused = api.job(api.submit(metadata={"do": "refuse"}), wait=30)["error"]
    assert refused == {
        "code": "unusable_model",
        "message": "its blocks hold no matrices",
        "param": "model",
        "retryable": False,
    }


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_worker_that_is_to_end_now_hands_its_job_back(
    api: Api, worker: WorkerProcess, data: Path, signals: list[signal.Signals]
) -> None:
    job_id = api.submit(metadata={"do": "stubborn"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    processes = worker.children()
    *first, last = signals
    began = time.monotonic()
    for number in first:
        worker.signal(number)
        wait_until(lambda: states(api) == [WorkerState.STOPPING], 5, "the worker has heard it")
        assert api.job(job_id)["status"] == "running"
    worker.signal(last)
    assert worker.wait() == 0
    assert time.monotonic() - began < 5
    assert not any(process.is_running() for process in processes)
    job = api.job(job_id)
    assert (job["status"], job["progress"]["queue_position"]) == ("queued", 1)
    assert api.service.queue.redis.hget(f"c2i:job:{job_id}", "crashes") == b"0"
    assert list((data / "artifacts" / "work").iterdir()) == []


def test_a_worker_that_is_to_end_lets_its_job_finish(api: Api, worker: WorkerProcess) -> None:
    # Both at once, since the first works for no more than a second; one worker takes them in this order.
    job_id, other = api.submit(metadata={"do": "slow"}), api.submit()
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    assert worker.terminate() == 0
    assert (api.job(job_id)["status"], api.job(other)["status"]) == ("succeeded", "queued")


def test_a_worker_hands_its_job_back_when_the_grace_is_over(api: Api, data: Path) -> None:
    worker = WorkerProcess(data, redis_url(data), env={"C2I_GRACE_SECONDS": "0.5"})
    job_id = api.submit(metadata={"do": "block"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    began = time.monotonic()
    assert worker.terminate() == 0
    assert 0.5 < time.monotonic() - began < 5
    assert api.job(job_id)["status"] == "queued"


def test_a_job_never_outlives_the_lease_of_its_frozen_worker(api: Api, worker: WorkerProcess, data: Path) -> None:
    job_id = api.submit(metadata={"do": "block"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    processes = worker.children()
    worker.signal(signal.SIGSTOP)
    lease = f"c2i:job:{job_id}:lease:1"
    gone = wait_until(
        lambda: all(is_gone(process) for process in processes) and api.service.queue.redis.pttl(lease),
        LEASE_SECONDS,
        "the job's processes are gone while the lease holds",
    )
    assert gone > 500
    worker.signal(signal.SIGCONT)
    wait_until(lambda: api.job(job_id)["attempt"] == 2, 10, "the worker gives the job back and takes it again")
    assert api.service.queue.redis.hget(f"c2i:job:{job_id}", "crashes") == b"0"


def test_a_worker_that_can_start_no_process_gives_its_job_back_and_goes_on(api: Api, worker: WorkerProcess) -> None:
    assert api.job(api.submit(), wait=30)["status"] == "succeeded"
    process = psutil.Process(worker.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (3, hard))  # what is open stays, nothing can be opened
    job_id = api.submit()
    wait_until(
        lambda: api.job(job_id)["attempt"] == 1 and api.job(job_id)["status"] == "queued", 10, "it is given back"
    )
    process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    job = api.job(job_id, wait=30)
    assert job["status"] == "succeeded"
    events = api.http.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert "queued again: its worker could not start a process" in [event["message"] for event in events]


def test_a_job_dies_with_its_killed_worker_and_is_queued_again_in_30_seconds(
    api: Api, worker: WorkerProcess, data: Path
) -> None:
    job_id = api.submit(metadata={"do": "once"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    child = worker.children()[0]
    worker.kill()
    began = time.monotonic()
    wait_until(lambda: is_gone(child), 2, "the child is gone")
    api.await_status(job_id, "queued", timeout=30)
    assert time.monotonic() - began < 30
    second = WorkerProcess(data, redis_url(data))
    try:
        job = api.job(job_id, wait=30)
        assert (job["status"], job["attempt"]) == ("succeeded", 2)
    finally:
        second.kill()


def test_a_job_survives_a_restart_of_redis(api: Api, worker: WorkerProcess, data: Path) -> None:
    job_id = api.submit(metadata={"do": "block"})
    wait_until(lambda: api.job(job_id)["progress"]["stage"] == "searching", 30, "the job is at work")
    child = worker.children()[0]
    before = int((data / "redis" / "pid").read_text())
    assert before == os.getpid()
    server = next(
        process for process in psutil.Process().children() if "redis" in process.name() or "valkey" in process.name()
    )
    server.send_signal(signal.SIGKILL)
    server.wait(5)
    assert api.job(job_id)["status"] == "running"
    assert child.is_running()
    api.http.post(f"/v1/jobs/{job_id}/cancel")
    assert api.job(job_id, wait=10)["status"] == "cancelled"
    assert api.job(api.submit(), wait=30)["status"] == "succeeded"


def test_the_parent_has_no_thread_but_its_own(worker: WorkerProcess, api: Api) -> None:
    assert api.job(api.submit(), wait=30)["status"] == "succeeded"
    # One thread: a fork copies the thread that calls it and the locks that others hold.
    assert psutil.Process(worker.pid).num_threads() == 1


def states(api: Api) -> list[WorkerState]:
    return [worker.state for worker in list_workers(api.service.queue.redis)]


def redis_url(data: Path) -> str:
    return f"unix://{data}/redis/redis.sock"

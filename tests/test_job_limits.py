"""A job over one of its limits ends by it and says so, and its worker goes on."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors import SafetensorError

from service import models
from service.artifacts import ArtifactStore
from service.embedded import EmbeddedRedis
from service.errors import Unavailable
from service.limits import BESIDES_BYTES
from service.settings import Settings
from tests.live import REPOSITORY, Api, WorkerProcess, spec, wait_until
from workers.attempt import explain
from workers.lease import Lease
from workers.limits import descendants, resident_bytes

LIMITS = {"C2I_JOB_MEMORY_BYTES": "500000000", "C2I_JOB_DISK_BYTES": "90000000", "C2I_JOB_TIMEOUT_SECONDS": "20"}


@pytest.fixture(scope="module")
def limited(shared_api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    data = shared_api.settings.data
    log = tmp_path_factory.mktemp("log") / "stderr"
    process = WorkerProcess(data, f"unix://{data}/redis/redis.sock", LIMITS, log)
    yield process
    process.kill()
    assert log.stat().st_size < 1_500_000, "a job's output is cut off"


@pytest.mark.parametrize(
    ("do", "code", "words"),
    [
        ("eat", "out_of_memory", "0.5 GB"),
        ("fill", "out_of_disk", "0.1 GB"),
        ("grow", "out_of_disk", "0.1 GB"),
        ("fork", "internal_error", "64 processes"),
    ],
)
def test_a_job_over_a_limit_fails_by_name_and_leaves_nothing(
    shared_api: Api, limited: WorkerProcess, do: str, code: str, words: str
) -> None:
    job = shared_api.job(shared_api.submit(metadata={"do": do}), wait=30)
    assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 1, code), job
    assert words in job["error"]["message"]
    work = shared_api.settings.data / "artifacts" / "work"
    wait_until(lambda: not limited.children() and not list(work.iterdir()), 5, "nothing of the job is left")
    assert shared_api.job(shared_api.submit(), wait=30)["status"] == "succeeded"


@pytest.mark.parametrize(("do", "level"), [("stubborn", "INFO"), ("noise", "INFO"), ("noise", "DEBUG")])
def test_a_job_over_its_time_fails_whatever_it_does(api: Api, data: Path, tmp_path: Path, do: str, level: str) -> None:
    log = tmp_path / "log"
    env = {"C2I_JOB_TIMEOUT_SECONDS": "2", "C2I_LOG_LEVEL": level}
    worker = WorkerProcess(data, f"unix://{data}/redis/redis.sock", env, log)
    try:
        job = api.job(api.submit(metadata={"do": do}), wait=30)
        assert (job["status"], job["attempt"], job["error"]["code"]) == ("failed", 1, "timed_out")
        assert "2 s" in job["error"]["message"]
        assert worker.children() == []
    finally:
        worker.kill()
    noise = log.read_bytes().count(b"noise")
    assert (noise > 1000) == (do == "noise" and level == "DEBUG"), "what a job prints is passed on for a fault's sake"
    assert log.stat().st_size < 1_100_000


def test_a_log_that_takes_no_more_costs_no_job(api: Api, data: Path, redis: EmbeddedRedis) -> None:
    # Long enough for the second job, which is to succeed.
    worker = WorkerProcess(data, redis.url, {"C2I_JOB_TIMEOUT_SECONDS": "5"}, Path("/dev/full"))
    try:
        assert api.job(api.submit(metadata={"do": "noise"}), wait=30)["error"]["code"] == "timed_out"
        assert api.job(api.submit(), wait=30)["status"] == "succeeded"
    finally:
        worker.kill()


def test_a_model_whose_copy_is_over_the_quota_is_refused_before_anything_is_written(
    api: Api, data: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = WorkerProcess(data, redis.url, {"C2I_JOB_DISK_BYTES": "60000000"})
    try:
        error: dict[str, Any] = api.job(api.submit(metadata={"do": "block"}), wait=30)["error"]
    finally:
        worker.kill()
    assert (error["code"], error["param"]) == ("unusable_model", "model")
    monkeypatch.setenv("C2I_JOB_DISK_BYTES", "60000000")
    strict = Api(data, redis.url)
    response = strict.http.post("/v1/jobs", json=spec())
    strict.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (422, "unusable_model")


def test_every_form_of_the_model_counts(
    api: Api, data: Path, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = models.resolve(data / "models", spec()["model"]).bytes
    monkeypatch.setenv("C2I_JOB_DISK_BYTES", str(int(BESIDES_BYTES + 1.5 * size)))
    strict = Api(data, redis.url)

    def answer(**fields: Any) -> httpx.Response:
        return strict.http.post("/v1/jobs", params={"dry_run": True}, json=spec() | fields)

    assert answer().status_code == 200
    for more in ({"gguf": "f16"}, {"strategy": "laser"}):
        refused = answer(**more)
        assert refused.status_code == 422 and "2 copies of this model" in refused.json()["error"]["message"]
    strict.stop()


def test_a_disk_without_room_is_said_before_a_job_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"GB left and the job needs 1000000\.0 GB"):
        ArtifactStore(tmp_path).check_room(10**15)


def forked(lease: Lease, work: str) -> int:
    """A process bound to a lease."""
    child = os.fork()
    if child == 0:
        try:
            os.setpgrp()
            lease.bind_this_process()
            if work == "holds the interpreter's lock":
                sum(range(10**11))
            time.sleep(60)
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize(
    ("work", "number"), [("sleeps", signal.SIGKILL), ("holds the interpreter's lock", signal.SIGALRM)]
)
def test_a_process_ends_with_its_lease_whatever_it_does(work: str, number: signal.Signals) -> None:
    lease = Lease()
    child = forked(lease, work)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    lease.renewed(time.monotonic() - 14)  # of 18 s, the last three of which are no more the process's own
    if work != "sleeps":
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Anew: a child that begins in the lease's last second is ended by its thread before it takes the lock.
        lease.renewed(time.monotonic() - 14)
        child = forked(lease, work)
    began = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -number
    assert 0.5 < time.monotonic() - began < 3


def test_a_process_lives_as_long_as_its_lease_is_renewed() -> None:
    lease = Lease()
    lease.renewed(time.monotonic() - 14)
    child = forked(lease, "sleeps")
    lease.renewed(time.monotonic())
    wait_until(lambda: psutil.Process(child).status() == "sleeping", 5, "it waits")
    with pytest.raises(AssertionError):
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0], 2.5, "it ends")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_memory_and_processes_are_told_as_they_are() -> None:
    before = resident_bytes(os.getpid())
    # New pages: an allocator may hand out what was resident before.
    held = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[:: mmap.PAGESIZE] = b"x" * -(-len(held) // mmap.PAGESIZE)
    assert len(held) * 0.9 < resident_bytes(os.getpid()) - before < len(held) * 1.5
    assert resident_bytes(2**22 + 1) == 0
    assert set(descendants(os.getpid())) == {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_library_that_tells_of_a_full_disk_in_words_alone_is_understood(tmp_path: Path) -> None:
    script = (
        "import resource, sys, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "from service.settings import Settings; from workers.attempt import explain\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: save_file({'a': torch.zeros(500_000)}, sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, explain(error, Settings()).code)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.split() == ["SafetensorError", "out_of_disk"]
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(full, Settings()).code == "unavailable"

"""`c2i serve` as a process: what it starts it stops, its state survives every restart, nothing outlives it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.embedded import EmbeddedRedis, find_server
from tests import tiny
from tests.live import REPOSITORY, ServeProcess, WorkerProcess, install, is_gone, spec, wait_until


def gone(processes: list[psutil.Process]) -> bool:
    return all(is_gone(process) for process in processes)


def submit(server: ServeProcess, **changes: object) -> str:
    response = server.http.post("/v1/jobs", json=spec(**changes))
    assert response.status_code == 202
    return str(response.json()["id"])


def await_status(server: ServeProcess, job_id: str, status: str, timeout: float = 30) -> None:
    def reached() -> bool:
        return bool(server.http.get(f"/v1/jobs/{job_id}").json()["status"] == status)

    wait_until(reached, timeout, f"{job_id} is {status}")


def test_it_starts_redis_and_workers_and_stops_them_all(data: Path) -> None:
    server = ServeProcess(data, "--workers", "2")
    try:
        assert server.http.get("/healthz").json() == {"status": "ok"}
        assert server.http.get("/readyz").json()["status"] == "ok"
        wait_until(lambda: len(server.children()) == 3, 10, "Redis and two workers run")
        children = server.children()
    finally:
        began = time.monotonic()
        assert server.stop() == 0
    assert time.monotonic() - began < 15
    assert gone(children)


def test_nothing_outlives_a_killed_service(data: Path) -> None:
    server = ServeProcess(data)
    wait_until(lambda: len(server.children()) == 2, 10, "Redis and a worker run")
    children = server.children()
    server.kill()
    wait_until(lambda: gone(children), 5, "Redis and the worker are gone")
    # And the folder can be served again at once.
    again = ServeProcess(data, "--workers", "0")
    assert again.stop() == 0


def test_a_worker_that_dies_is_started_again(data: Path) -> None:
    server = ServeProcess(data)
    try:
        wait_until(lambda: len(server.children()) == 2, 10, "Redis and a worker run")
        worker = next(child for child in server.children() if "redis" not in child.name())
        worker.kill()
        worker.wait(5)
        wait_until(lambda: len(server.children()) == 2, 10, "another worker runs")
        assert worker.pid not in [child.pid for child in server.children()]
    finally:
        assert server.stop() == 0


@pytest.fixture
def slow_data(data: Path, tiny_models: Callable[..., Path]) -> Path:
    install(tiny_models("gpt2"), data, "tiny-gpt2")
    return data


@pytest.mark.parametrize(("number", "grace"), [(signal.SIGINT, 25), (signal.SIGTERM, 3)])
def test_a_terminal_does_not_wait_for_jobs_and_a_supervisor_does(
    slow_data: Path, number: signal.Signals, grace: int
) -> None:
    server = ServeProcess(slow_data, env={"C2I_GRACE_SECONDS": str(grace)})
    long = spec(model="tiny-gpt2", examples=tiny.learnable_examples(10_000), passes=8)
    job_id = str(server.http.post("/v1/jobs", json=long).json()["id"])
    wait_until(lambda: server.http.get(f"/v1/jobs/{job_id}").json()["progress"]["stage"], 90, "the job is at work")
    began = time.monotonic()
    assert server.stop(number) == 0
    took = time.monotonic() - began
    assert took < grace if number is signal.SIGINT else grace < took, took
    server = ServeProcess(slow_data, "--workers", "0")
    try:
        assert server.http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
    finally:
        server.stop()


def test_a_worker_that_cannot_start_says_why_and_is_tried_ever_less_often(data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart.so.12 is missing')")
    path = os.pathsep.join(filter(None, [str(tmp_path / "broken"), os.environ.get("PYTHONPATH")]))
    with (tmp_path / "log").open("wb") as log:
        server = ServeProcess(data, env={"PYTHONPATH": path}, log=log)
    try:
        pauses = wait_until(lambda: restarts((tmp_path / "log").read_text()), 30, "it is tried three times again")
        said = (tmp_path / "log").read_text()
        assert "the worker's packages cannot be loaded: libcudart.so.12 is missing" in said
        assert "Traceback" not in said
        assert pauses == [0.2, 0.4, 0.8]
        assert server.http.get("/readyz").status_code == 200  # it takes jobs, for workers elsewhere or later
    finally:
        assert server.stop() == 0


def restarts(log: str) -> list[float] | None:
    """The first three pauses before a worker was started again."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    pauses = [line["pause"] for line in lines if line.get("problem") == "ended with code 3"]
    return pauses[:3] if len(pauses) > 2 else None


def test_jobs_survive_a_killed_service_with_its_embedded_redis(data: Path) -> None:
    server = ServeProcess(data, "--workers", "0")
    queued, cancelled = submit(server), submit(server, metadata={"a": "b"})
    server.http.post(f"/v1/jobs/{cancelled}/cancel")
    before = {job["id"]: job for job in server.http.get("/v1/jobs").json()["data"]}
    events = server.http.get(f"/v1/jobs/{queued}/events").json()
    server.kill()

    server = ServeProcess(data, "--workers", "0")
    try:
        assert {job["id"]: job for job in server.http.get("/v1/jobs").json()["data"]} == before
        assert server.http.get(f"/v1/jobs/{queued}/events").json() == events
        worker = WorkerProcess(data, f"unix://{data}/redis/redis.sock")
        await_status(server, queued, "succeeded")
        worker.kill()
        assert server.http.get(f"/v1/jobs/{cancelled}").json()["status"] == "cancelled"
    finally:
        assert server.stop() == 0


def test_a_job_survives_the_death_of_everything_at_once(data: Path) -> None:
    server = ServeProcess(data, "--workers", "0")
    worker = WorkerProcess(data, f"unix://{data}/redis/redis.sock")
    job_id = submit(server, metadata={"do": "once"})
    url = f"/v1/jobs/{job_id}"
    wait_until(lambda: server.http.get(url).json()["progress"]["stage"] == "searching", 30, "the job is at work")
    worker.kill()
    server.kill()

    began = time.monotonic()
    server = ServeProcess(data, "--workers", "0")
    worker = WorkerProcess(data, f"unix://{data}/redis/redis.sock")
    try:
        await_status(server, job_id, "succeeded", timeout=35)
        assert time.monotonic() - began < 30
        assert server.http.get(f"/v1/jobs/{job_id}").json()["attempt"] == 2
    finally:
        worker.kill()
        assert server.stop() == 0


@pytest.fixture
def external_redis(tmp_path: Path) -> Iterator[str]:
    """The URL of a Redis that somebody else started, on TCP and with a password."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", "pass-word", "--dir", str(tmp_path)]
    server = subprocess.Popen([find_server(), *options], stdout=subprocess.DEVNULL)
    yield f"redis://:pass-word@127.0.0.1:{port}/3"
    server.terminate()
    server.wait(10)


def test_an_external_redis_is_used_and_its_state_survives_the_services_restart(data: Path, external_redis: str) -> None:
    server = ServeProcess(data, "--workers", "0", env={"REDIS_URL": external_redis})
    job_id = submit(server)
    assert server.children() == []
    assert not (data / "redis").exists()
    assert server.stop() == 0
    server = ServeProcess(data, "--workers", "0", env={"REDIS_URL": external_redis})
    worker = WorkerProcess(data, external_redis)
    try:
        await_status(server, job_id, "succeeded")
    finally:
        worker.kill()
        assert server.stop() == 0


def test_the_password_of_redis_is_in_no_argument(data: Path, external_redis: str) -> None:
    server = ServeProcess(data, env={"REDIS_URL": external_redis})
    try:
        (worker,) = wait_until(server.children, 10, "a worker runs")
        assert not any("pass-word" in argument for argument in worker.cmdline())
        assert worker.environ()["REDIS_URL"] == external_redis
    finally:
        assert server.stop() == 0


def test_when_redis_goes_away_requests_are_503_and_come_back(data: Path, tmp_path: Path) -> None:
    external = EmbeddedRedis(tmp_path / "elsewhere")
    external.start()
    server = ServeProcess(data, "--workers", "0", env={"REDIS_URL": external.url})
    try:
        job_id = submit(server)
        external.stop()
        for response in (server.http.get("/readyz"), server.http.post("/v1/jobs", json=spec())):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
            assert response.headers["retry-after"]
        assert server.http.get("/healthz").status_code == 200
        external = EmbeddedRedis(tmp_path / "elsewhere")
        external.start()
        assert server.http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
    finally:
        assert server.stop() == 0
        external.stop()


def test_answers_do_not_wait_for_an_acknowledgement(data: Path) -> None:
    server = ServeProcess(data, "--workers", "0")
    try:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            server.http.get("/healthz")
            times.append(time.perf_counter() - began)
        assert sorted(times)[15] < 0.03  # Nagle's algorithm and a delayed ACK make it 0.044
    finally:
        assert server.stop() == 0


def run_serve(*options: str, redis_url: str | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    return subprocess.run(
        [sys.executable, "-m", "service.cli", "serve", *options],
        cwd=REPOSITORY,
        env=clean | ({"REDIS_URL": redis_url} if redis_url else {}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [("redis://127.0.0.1:1", 3, "does not answer"), ("localhost:6379", 2, "redis://"), ("http://x", 2, "redis://")],
)
def test_a_redis_that_is_not_there_is_said_in_a_line(data: Path, url: str, code: int, said: str) -> None:
    result = run_serve("--data", str(data), "--port", "0", "--workers", "0", redis_url=url)
    assert result.returncode == code
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("try: ")]
    assert said in line


def test_a_data_folder_that_is_none_is_said_in_one_line() -> None:
    result = run_serve("--data", "/etc/hostname", "--port", "0", "--workers", "0")
    assert result.returncode == 3
    assert "/etc/hostname" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_said_in_one_line(data: Path) -> None:
    server = ServeProcess(data, "--workers", "0")
    try:
        result = run_serve("--port", server.url.rpartition(":")[2], "--data", str(data / "other"))
        assert result.returncode == 2
        assert "--port" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    finally:
        assert server.stop() == 0

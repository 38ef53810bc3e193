"""What an operator sees: logs, `/metrics`, `/readyz`, `/v1/workers`; and what none of them ever shows."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.access import HEADER
from service.embedded import EmbeddedRedis
from service.errors import InvalidInput
from service.logs import describe
from service.metrics import COUNTED
from tests.live import REPOSITORY, Api, ServeProcess, WorkerProcess, install, redis, spec, wait_until

SECRET = "the-secret-of-the-example"
DOCUMENTED = re.compile(r"^\| `(c2i_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
USED = re.compile(r"\bc2i_\w+")


@pytest.fixture
def folder(tiny_models: Callable[..., Path], tmp_path: Path) -> Path:
    install(tiny_models("llama"), tmp_path)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedRedis]:
    started = redis(folder)
    yield started
    started.stop()


@pytest.fixture
def api(folder: Path, server: EmbeddedRedis) -> Iterator[Api]:
    started = Api(folder, server.url)
    yield started
    started.stop()


def scrape(api: Api) -> dict[str, float]:
    """Each sample of `/metrics` by its name and labels."""
    response = api.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_follow_a_job_from_the_queue_to_its_end(api: Api, folder: Path, server: EmbeddedRedis) -> None:
    waiting = api.submit()
    found = scrape(api)
    assert found["c2i_jobs|queued"] == found["c2i_queue_depth"] == found["c2i_jobs_created_total"] == 1
    assert found["c2i_queue_oldest_seconds"] > 0
    assert found["c2i_workers|idle"] == 0
    assert 0 < found["c2i_disk_free_bytes"] <= found["c2i_disk_size_bytes"]
    worker = WorkerProcess(folder, server.url)
    try:
        api.await_status(waiting, "succeeded")
        lost = api.submit(metadata={"do": "die"})
        api.await_status(lost, "failed", 60)
        found = scrape(api)
        assert found["c2i_jobs|queued"] == found["c2i_jobs|running"] == found["c2i_queue_oldest_seconds"] == 0
        assert found["c2i_jobs_ended_total|succeeded"] == found["c2i_jobs_ended_total|failed"] == 1
        assert found["c2i_attempts_total"] == found["c2i_queue_waits_total"] == 4
        assert found["c2i_attempts_lost_total"] == 3
        assert found["c2i_stages_total|loading"] >= 1 and found["c2i_stages_total|publishing"] == 1
        assert found["c2i_published_bytes_total"] > 1_000_000
        assert found["c2i_queue_wait_seconds_total"] > 0
        assert sum(value for name, value in found.items() if name.startswith("c2i_workers|")) == 1
        assert found["c2i_jobs_kept"] == 2
    finally:
        worker.terminate()


def test_requests_are_counted_by_route_and_never_by_path(api: Api) -> None:
    job_id = api.submit()
    for _ in range(3):
        api.job(job_id)
    api.http.get("/no/such/../route?token=secret")
    found = scrape(api)
    assert found["c2i_http_request_seconds_count|GET|/v1/jobs/{job_id}|200"] == 3
    assert found["c2i_http_request_seconds_count|any|unmatched|404"] == 1
    assert found["c2i_http_sent_bytes_total|/v1/jobs/{job_id}"] > 0
    assert not [name for name in found if job_id in name or "secret" in name]


def test_every_metric_is_documented_and_every_documented_one_is_there(api: Api) -> None:
    api.submit()
    api.job(api.submit())
    text = (REPOSITORY / "docs/metrics.md").read_text()
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in DOCUMENTED.findall(text)}
    families = {
        family.name: (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        for family in text_string_to_metric_families(api.http.get("/metrics").text)
        if not family.name.endswith("_created") or family.name == "c2i_jobs_created"
    }
    assert families.keys() == documented.keys()
    for name, (kind, labels) in families.items():
        assert kind == documented[name][0]
        assert labels <= documented[name][1]
    assert {metric for metric, _, labels in COUNTED.values() if labels} <= documented.keys()


@pytest.mark.parametrize("path", ["docker/alerts.yaml", "docker/grafana-dashboard.json", "docs/metrics.md"])
def test_what_rules_and_panels_name_is_a_metric(path: str) -> None:
    documented = {name for name, _, _ in DOCUMENTED.findall((REPOSITORY / "docs/metrics.md").read_text())}
    text = (REPOSITORY / path).read_text()
    used = {re.sub(r"_(total|count|bucket|sum)$", "", name) for name in USED.findall(text)}
    assert used and used <= documented
    if path.endswith(".json"):
        panels = json.loads(text)["panels"]
        assert len({panel["title"] for panel in panels}) == len(panels)


def test_a_service_without_workers_is_ready_and_says_so(api: Api, folder: Path, server: EmbeddedRedis) -> None:
    assert api.http.get("/readyz").json() == {"status": "ok", "workers": 0}
    assert api.http.get("/v1/workers").json() == {"data": []}
    worker = WorkerProcess(folder, server.url)
    try:
        wait_until(lambda: api.http.get("/readyz").json()["workers"] == 1, 20, "the worker is seen")
        (seen,) = api.http.get("/v1/workers").json()["data"]
        assert seen["pid"] == worker.pid and seen["state"] == "idle" and seen["device"] == "cpu"
    finally:
        worker.terminate()
    assert api.http.get("/readyz").json() == {"status": "ok", "workers": 0}


def test_a_service_without_redis_is_not_ready_and_lives(api: Api, server: EmbeddedRedis) -> None:
    server.stop()
    answer = api.http.get("/readyz", timeout=5)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"].startswith("Redis does not answer")
    assert api.http.get("/healthz").status_code == 200


def test_a_redis_that_answers_nothing_is_noticed_within_seconds(api: Api, server: EmbeddedRedis) -> None:
    process = psutil.Process(server.pid or 0)
    process.send_signal(signal.SIGSTOP)
    try:
        assert api.http.get("/readyz", timeout=6).status_code == 503
    finally:
        process.send_signal(signal.SIGCONT)
    assert api.http.get("/readyz").status_code == 200


def test_a_full_disk_is_not_ready(folder: Path, server: EmbeddedRedis, tmp_path: Path) -> None:
    """A disk of a few kilobytes, filled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        api = Api(disk, server.url)
        try:
            assert api.http.get("/readyz").status_code == 200
            with (disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 1024)
            answer = api.http.get("/readyz")
            assert answer.status_code == 503
            assert "No space left" in answer.json()["error"]["message"]
        finally:
            api.stop()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_request_has_an_id_that_its_log_line_bears(folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        server = ServeProcess(folder, "--workers", "0", log=log)
        try:
            given = server.http.get("/v1/models", headers={HEADER: "mine-1"})
            assert given.headers[HEADER] == "mine-1"
            forged = server.http.get("/v1/models?key=secret", headers={HEADER: 'x"\\ {}'})
            assert re.fullmatch(r"[0-9a-f]{16}", forged.headers[HEADER])
            job_id = server.http.post("/v1/jobs", json=spec()).json()["id"]
            server.http.get(f"/v1/jobs/{job_id}")
        finally:
            server.stop()
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in requests[:2]] == ["mine-1", forged.headers[HEADER]]
    assert requests[0]["route"] == "/v1/models" and requests[0]["status"] == 200
    assert requests[3]["job_id"] == job_id
    assert "secret" not in (folder / "log").read_text()


@pytest.mark.parametrize("what", ["bug", "die", "exit", "memory", "refuse"])
def test_no_example_and_no_path_is_in_logs_errors_or_metrics(
    what: str, api: Api, folder: Path, server: EmbeddedRedis
) -> None:
    worker = WorkerProcess(folder, server.url, log=folder / "log")
    try:
        examples = [{"prompt": f"{SECRET} {k}", "completion": " yes"} for k in range(12)]
        job_id = api.submit(examples=examples, metadata={"do": what})
        job = api.await_status(job_id, "failed", 60)
    finally:
        worker.terminate()
    logged = (folder / "log").read_text()
    shown = json.dumps(job["error"]) + api.http.get("/metrics").text + api.http.get(f"/v1/jobs/{job_id}/events").text
    for text in (logged, shown):
        assert SECRET not in text
        assert str(folder) not in text
    lines = [json.loads(line) for line in logged.splitlines()]
    of_the_job = [line for line in lines if line.get("job_id") == job_id]
    assert of_the_job and all("attempt" in line for line in of_the_job)
    if what == "bug":
        (failed,) = [line for line in of_the_job if "exception" in line]
        assert failed["exception"][0]["type"] == "RuntimeError"
        assert "message" not in failed["exception"][0]
        assert failed["exception"][0]["at"][-1].startswith("__main__:")


def test_our_own_errors_are_told_with_their_message_and_their_cause_without() -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise InvalidInput("passes is at most 8") from error
    except InvalidInput as error:
        told = describe(error)
    assert [one["type"] for one in told] == ["InvalidInput", "ValueError"]
    assert told[0]["message"] == "passes is at most 8"
    assert SECRET not in json.dumps(told)


def test_other_packages_lines_have_the_same_form() -> None:
    code = "from service import logs; import logging; logs.configure(); logging.getLogger('x').warning('%s!', 'hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    line = json.loads(done.stderr)
    assert (line["event"], line["logger"], line["level"]) == ("hello!", "x", "warning")

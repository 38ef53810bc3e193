"""What an operator sees: logs, `/metrics`, `/readyz`, `/v1/workers`; and what none of them ever shows."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from service.access import HEADER
from service.connections import socket_url
from service.embedded import EmbeddedRedis, socket_path
from service.errors import InvalidInput
from service.logs import describe
from service.metrics import COUNTED
from tests.live import REPOSITORY, Api, ServeProcess, WorkerProcess, spec, wait_until

SECRET = "the-secret-of-the-example"
DOCUMENTED = re.compile(r"^\| `(c2i_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)
USED = re.compile(r"\bc2i_\w+")


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
    }
    assert families.keys() == documented.keys()
    for name, (kind, labels) in families.items():
        assert kind == documented[name][0]
        assert labels <= documented[name][1]
    assert {metric for metric, *_ in COUNTED.values()} <= documented.keys()


@pytest.mark.parametrize("path", ["docker/alerts.yaml", "docker/grafana-dashboard.json", "docs/metrics.md"])
def test_what_rules_and_panels_name_is_a_metric(path: str) -> None:
    documented = {name for name, _, _ in DOCUMENTED.findall((REPOSITORY / "docs/metrics.md").read_text())}
    text = (REPOSITORY / path).read_text()
    used = {re.sub(r"_(total|count|bucket|sum)$", "", name) for name in USED.findall(text)}
    assert used and used <= documented
    if path.endswith(".json"):
        panels = json.loads(text)["panels"]
        assert len({panel["title"] for panel in panels}) == len(panels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (apt-get install prometheus) is not installed")
def test_names_keep_to_conventions_rules_fire_where_they_should_and_panels_can_be_evaluated(
    api: Api, tmp_path: Path
) -> None:
    def promtool(*arguments: str | Path, given: str = "") -> None:
        command = ["promtool", *arguments]
        done = subprocess.run(command, check=False, input=given, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr

    api.submit()
    promtool("check", "metrics", given=api.http.get("/metrics").text)

    promtool("test", "rules", "tests/alerts.yaml")
    panels = json.loads((REPOSITORY / "docker/grafana-dashboard.json").read_text())["panels"]
    rules = [{"record": "a", "expr": target["expr"]} for panel in panels for target in panel["targets"]]
    (tmp_path / "panels.yaml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "panels.yaml")


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
    found = scrape(api)
    assert (found["c2i_ready|redis"], found["c2i_ready|disk"]) == (0, 1)
    assert "c2i_jobs|queued" not in found
    assert api.http.get("/healthz").status_code == 200


def test_a_service_whose_redis_writes_nothing_is_not_ready(api: Api) -> None:
    redis = api.service.queue.redis
    redis.config_set("maxmemory", 1)
    try:
        answer = api.http.get("/readyz")
    finally:
        redis.config_set("maxmemory", 0)
    assert answer.status_code == 503
    assert "refuses to write" in answer.json()["error"]["message"]
    assert api.http.get("/readyz").status_code == 200


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


def test_an_error_that_nobody_foresaw_has_its_request_id_and_says_nothing_of_the_job(folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        server = ServeProcess(folder, "--workers", "0", log=log)
        try:
            job_id = server.http.post("/v1/jobs", json=spec()).json()["id"]
            with Redis.from_url(socket_url(str(socket_path(folder)))) as records:
                records.hset(f"c2i:job:{job_id}", "result", json.dumps({"verdict": [SECRET, str(folder)]}))
            answer = server.http.get(f"/v1/jobs/{job_id}", headers={HEADER: "mine-2"})
            server.http.get(f"/v1/jobs/{SECRET}")
            server.http.get("/v1/jobs", headers={HEADER: f"c2i_{SECRET}"})
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
                client.sendall(f"{SECRET}\r\n\r\n".encode())
                assert client.recv(100).startswith(b"HTTP/1.1 400")
        finally:
            server.stop()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers[HEADER] == "mine-2"
    logged = (folder / "log").read_text()
    assert SECRET not in logged + answer.text
    assert str(folder) not in logged + answer.text
    assert str(REPOSITORY) not in logged
    lines = [json.loads(line) for line in logged.splitlines()]
    assert "Invalid HTTP request received." in {line["event"] for line in lines}
    created, failed, request = [line for line in lines if line.get("job_id") == job_id]
    assert created["event"] == "request" and created["request_id"] != "mine-2"
    assert failed["event"] == "a request failed" and failed["exception"][0]["type"] == "ValidationError"
    assert any(place.startswith("service.queue:") for place in failed["exception"][0]["at"])
    assert request["request_id"] == failed["request_id"] == "mine-2" and request["status"] == 500


@pytest.mark.parametrize("what", ["bug", "tell", "die", "exit", "memory", "refuse"])
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
    if what in ("bug", "tell", "memory", "refuse"):
        (failed,) = [line for line in of_the_job if line["event"] == "the job failed"]
        assert (failed["code"], failed["reason"]) == (job["error"]["code"], job["error"]["message"])
    if what == "tell":
        events = {line["event"] for line in of_the_job}
        assert {"a package warns", "a package logs something", "failed: RuntimeError", "failed"} <= events
        assert {"a thread ends by an error", "the attempt failed"} <= events
        (dropped,) = [line for line in of_the_job if line["event"].startswith("what the job's process printed")]
        assert dropped["bytes"] > len(SECRET)
        told = [line["exception"] for line in of_the_job if line["event"] == "the attempt failed"]
        assert [error["type"] for error in told[0]] == ["KeyError", "RuntimeError"]
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
    code = "from service import logs; import logging; logs.configure(); logging.getLogger('rq').warning('%s!', 'hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    line = json.loads(done.stderr)
    assert (line["event"], line["logger"], line["level"]) == ("hello!", "rq", "warning")

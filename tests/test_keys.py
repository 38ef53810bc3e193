"""API keys: which route needs which scope, whose jobs a key sees, and that its text is with its owner alone."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from starlette.routing import Route

from service import embedded
from service.client import Client
from service.connections import connect
from service.embedded import EmbeddedRedis, reach_redis
from service.errors import InvalidInput, NotFound, Unauthenticated
from service.jobs import JobSpec
from service.keys import KEYS, Key, KeyStore, Scope
from service.queue import OWNED, JobQueue
from service.records import new_job_id
from service.routes.page import page_files
from service.settings import Settings
from tests.live import REPOSITORY, Api, ServeProcess, WorkerProcess, spec

SUBMIT, READ, ADMIN = Scope.SUBMIT, Scope.READ, Scope.ADMIN
EVERYTHING = frozenset({SUBMIT, READ})

# What each route needs. A new route stands here or in OPEN, or the first test fails.
NEEDS = {
    ("POST", "/v1/jobs"): SUBMIT,
    ("GET", "/v1/jobs"): READ,
    ("GET", "/v1/jobs/{job_id}"): READ,
    ("POST", "/v1/jobs/{job_id}/cancel"): SUBMIT,
    ("DELETE", "/v1/jobs/{job_id}"): SUBMIT,
    ("GET", "/v1/jobs/{job_id}/events"): READ,
    ("GET", "/v1/jobs/{job_id}/report"): READ,
    ("HEAD", "/v1/jobs/{job_id}/report"): READ,
    ("GET", "/v1/jobs/{job_id}/files"): READ,
    ("GET", "/v1/jobs/{job_id}/files/{path:path}"): READ,
    ("HEAD", "/v1/jobs/{job_id}/files/{path:path}"): READ,
    ("GET", "/v1/jobs/{job_id}/adapter.zip"): READ,
    ("HEAD", "/v1/jobs/{job_id}/adapter.zip"): READ,
    ("GET", "/v1/jobs/{job_id}/model.zip"): READ,
    ("HEAD", "/v1/jobs/{job_id}/model.zip"): READ,
    ("GET", "/v1/jobs/{job_id}/quantized.zip"): READ,
    ("HEAD", "/v1/jobs/{job_id}/quantized.zip"): READ,
    ("GET", "/v1/jobs/{job_id}/factored.zip"): READ,
    ("HEAD", "/v1/jobs/{job_id}/factored.zip"): READ,
    ("POST", "/v1/jobs/{job_id}/tries"): SUBMIT,
    ("GET", "/v1/jobs/{job_id}/tries/{try_id}"): READ,
    ("POST", "/v1/files"): SUBMIT,
    ("GET", "/v1/files"): READ,
    ("GET", "/v1/files/{file_id}"): READ,
    ("GET", "/v1/files/{file_id}/content"): READ,
    ("DELETE", "/v1/files/{file_id}"): SUBMIT,
    ("POST", "/v1/fine_tuning/jobs"): SUBMIT,
    ("GET", "/v1/fine_tuning/jobs"): READ,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): READ,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): SUBMIT,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): SUBMIT,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): SUBMIT,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): READ,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): READ,
    ("GET", "/v1/models"): READ,
    ("GET", "/v1/workers"): ADMIN,
    ("GET", "/metrics"): ADMIN,
}
PAGE = ("/openapi.json", *page_files())
OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/service"),
    *((method, path) for method in ("GET", "HEAD") for path in PAGE),
}
GUARDED = sorted(NEEDS)
OF_A_JOB = sorted(route for route in NEEDS if "{job_id}" in route[1])


class Locked:
    """An API on loopback that requires keys, with keys of every sort and a finished job of one of them."""

    def __init__(self, data: Path, redis_url: str) -> None:
        self.api = Api(data, redis_url, require_keys=True, tries=True)
        self.parameters = {"path:path": "report.json"}
        self.keys: KeyStore = self.api.service.keys
        self.owner, self.owner_key = self.keys.create("owner", EVERYTHING)
        self.other, self.other_key = self.keys.create("other", EVERYTHING)
        self.admin, _ = self.keys.create("admin", frozenset({ADMIN}))
        self.scoped = {scope: self.keys.create(scope.value, frozenset({scope}))[0] for scope in Scope}
        self.revoked, revoked = self.keys.create("revoked", EVERYTHING)
        self.keys.revoke(revoked.id)
        self.expired, expired = self.keys.create("expired", EVERYTHING, timedelta(days=1))
        self.age(expired)

    def age(self, key: Key) -> None:
        """Make a key's day of expiry yesterday."""
        redis = self.api.service.queue.redis
        for digest, record in redis.hgetall(KEYS).items():
            if json.loads(record)["id"] == key.id:
                yesterday = datetime.now(UTC) - timedelta(days=1)
                redis.hset(KEYS, digest, key.model_copy(update={"expires_at": yesterday}).model_dump_json())

    def ask(self, method: str, path: str, key: str | None, job_id: str, **options: Any) -> httpx.Response:
        """One request, with the placeholders of its path filled."""
        url = re.sub(r"\{([\w:]+)\}", lambda match: self.parameters.get(match[1], job_id), path)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.api.http.request(method, url, headers=headers, **options)

    def submit(self, key: str, **changes: Any) -> str:
        """Queue a job with a key; its ID."""
        response = self.ask("POST", "/v1/jobs", key, "", json=spec(**changes))
        assert response.status_code == 202, response.text
        return str(response.json()["id"])


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any) -> Iterator[Locked]:
    from tests import live

    data = tmp_path_factory.mktemp("locked")
    live.install(tiny_models("llama"), data)
    server = live.redis(data)
    made = Locked(data, server.url)
    yield made
    made.api.stop()
    server.stop()


@pytest.fixture(scope="module")
def finished(locked: Locked) -> str:
    """A job of `owner` that has published."""
    job_id = locked.submit(locked.owner, quantize="int8", metadata={"do": "factor"})
    worker = WorkerProcess(locked.api.settings.data, connect_url(locked))
    waited = locked.ask("GET", "/v1/jobs/{job_id}", locked.owner, job_id, params={"wait": 60}).json()
    worker.kill()
    assert waited["status"] == "succeeded", waited
    asked = locked.ask("POST", "/v1/jobs/{job_id}/tries", locked.owner, job_id, json={"prompt": "Answer:"})
    locked.parameters["try_id"] = asked.json()["id"]
    return job_id


def connect_url(locked: Locked) -> str:
    return EmbeddedRedis(locked.api.settings.data).url


def code(response: httpx.Response) -> str | None:
    return None if not response.content else response.json().get("error", {}).get("code")


def test_every_route_has_its_scope_or_is_open_by_decision(locked: Locked) -> None:
    routes = list(iter_route_contexts(locked.api.app.routes))
    assert all(isinstance(route.original_route, Route) for route in routes)  # no mount, no websocket
    assert {(method, route.path) for route in routes for method in route.methods or ()} == set(NEEDS) | OPEN


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_stranger_is_told_nothing(locked: Locked, method: str, path: str, finished: str) -> None:
    wrong = f"c2i_{'x' * 43}"
    for key in (None, wrong, locked.revoked, locked.expired, locked.owner[:-1], locked.owner_key.id):
        for job_id in (finished, new_job_id(), "nonsense"):
            response = locked.ask(method, path, key, job_id)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            if method != "HEAD":
                assert code(response) == "unauthenticated"
                assert key is None or key not in response.text
    schemes = ({"Authorization": f"Basic {locked.owner}"}, {"Authorization": locked.owner}, {"X-Key": locked.owner})
    for headers in schemes:
        response = locked.api.http.request(method, path.replace("{job_id}", finished), headers=headers)
        assert response.status_code == 401


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_key_without_the_scope_is_told_which_it_lacks(locked: Locked, method: str, path: str, finished: str) -> None:
    needed = NEEDS[method, path]
    for scope, key in locked.scoped.items():
        if scope in (needed, ADMIN):
            continue
        response = locked.ask(method, path, key, finished)
        assert response.status_code == 403
        if method != "HEAD":
            assert code(response) == "forbidden"
            assert f"`{needed.value}`" in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), OF_A_JOB)
def test_anothers_job_is_as_one_that_is_not_there(locked: Locked, method: str, path: str, finished: str) -> None:
    absent = new_job_id()
    theirs = locked.ask(method, path, locked.other, finished)
    nobodys = locked.ask(method, path, locked.other, absent)
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(finished, "ID") == nobodys.text.replace(absent, "ID")
    assert theirs.headers.keys() == nobodys.headers.keys()


@pytest.mark.parametrize(("method", "path"), [route for route in OF_A_JOB if NEEDS[route] is READ])
def test_its_owner_and_an_admin_see_a_job(locked: Locked, method: str, path: str, finished: str) -> None:
    for key in (locked.owner, locked.admin):
        assert locked.ask(method, path, key, finished).status_code == 200


def test_the_scopes_are_enough_for_what_they_are_for(locked: Locked) -> None:
    submit, read = locked.scoped[SUBMIT], locked.scoped[READ]
    job_id = locked.submit(submit)
    assert locked.ask("POST", "/v1/jobs/{job_id}/cancel", submit, job_id).json()["status"] == "cancelled"
    assert locked.ask("DELETE", "/v1/jobs/{job_id}", submit, job_id).status_code == 204
    assert locked.ask("GET", "/v1/jobs", read, "").json() == {"data": [], "next": None}
    assert locked.ask("GET", "/v1/models", read, "").json()["data"]


def test_an_admin_cancels_and_deletes_what_belongs_to_another(locked: Locked) -> None:
    job_id = locked.submit(locked.other)
    assert locked.ask("POST", "/v1/jobs/{job_id}/cancel", locked.admin, job_id).status_code == 200
    assert locked.ask("DELETE", "/v1/jobs/{job_id}", locked.admin, job_id).status_code == 204
    assert locked.ask("GET", "/v1/jobs/{job_id}", locked.other, job_id).status_code == 404


def test_lists_hold_the_callers_jobs_alone_page_by_page(locked: Locked) -> None:
    one, _ = locked.keys.create("one", EVERYTHING)
    two, _ = locked.keys.create("two", EVERYTHING)
    mine: dict[str, list[str]] = {one: [], two: []}
    for key in (one, two, one, one, two):
        mine[key].insert(0, locked.submit(key))
    for key, ids in mine.items():
        found, after = [], None
        while True:
            params = {"limit": 2} | ({"after": after} if after else {})
            page = locked.ask("GET", "/v1/jobs", key, "", params=params).json()
            found += [job["id"] for job in page["data"]]
            after = page["next"]
            if after is None:
                break
        assert sorted(found) == sorted(ids)
        assert [job_id[:14] for job_id in found] == sorted((job_id[:14] for job_id in ids), reverse=True)
    everybodys = {job["id"] for job in locked.ask("GET", "/v1/jobs", locked.admin, "").json()["data"]}
    assert {*mine[one], *mine[two]} <= everybodys


def test_health_is_open_and_documentation_says_where_keys_are_needed(locked: Locked) -> None:
    for path in ("/healthz", "/readyz"):
        assert locked.api.http.get(path).status_code == 200
    document = locked.api.http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            guarded = (method.upper(), path) not in OPEN
            assert ("security" in operation) == guarded, path
            assert ({"401", "403"} <= operation["responses"].keys()) == guarded, path


def test_without_keys_in_force_nothing_is_asked_and_nothing_of_keys_documented(shared_api: Api) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}):
        assert shared_api.http.get("/v1/jobs", headers=headers).status_code == 200
    document = shared_api.http.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    assert "security" not in document["paths"]["/v1/jobs"]["get"]
    assert "401" not in document["paths"]["/v1/jobs"]["get"]["responses"]


def test_a_revoked_key_ends_with_the_next_request_and_its_jobs_stay(locked: Locked) -> None:
    text, key = locked.keys.create("short", EVERYTHING)
    job_id = locked.submit(text)
    assert locked.keys.revoke(key.id).state == "revoked"
    assert locked.keys.revoke(key.id).state == "revoked"
    response = locked.ask("GET", "/v1/jobs/{job_id}", text, job_id)
    assert response.status_code == 401
    assert "revoked" in response.json()["error"]["message"]
    assert locked.ask("GET", "/v1/jobs/{job_id}", locked.admin, job_id).status_code == 200
    with pytest.raises(NotFound, match="keys list"):
        locked.keys.revoke("key_0000000000000000")


def test_the_text_of_a_key_is_in_no_log_record_nor_error(
    locked: Locked, finished: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    texts = [locked.owner, locked.other, locked.revoked, locked.expired, f"c2i_{'y' * 43}"]
    answers = [locked.ask(method, path, text, finished).content for method, path in GUARDED for text in texts
               if method == "GET"]  # fmt: skip
    redis = locked.api.service.queue.redis
    stored = [str((key, redis.dump(key))) for key in redis.keys("*")]
    stored += [str(pair) for pair in redis.hgetall(KEYS).items()]
    files = [path.read_bytes() for path in locked.api.settings.data.rglob("*") if path.is_file()]
    for text in texts:
        assert text not in caplog.text
        assert not any(text in one for one in stored)
        assert not any(text.encode() in one for one in (*answers, *files))


def test_a_bad_name_scope_or_lifetime_makes_no_key(locked: Locked) -> None:
    before = locked.keys.list_keys()
    for name, scopes, lifetime, param in (
        ("", EVERYTHING, None, "name"),
        ("a" * 65, EVERYTHING, None, "name"),
        ("a\nb", EVERYTHING, None, "name"),
        ("a", frozenset[Scope](), None, "scopes"),
        ("a", EVERYTHING, timedelta(), "expires"),
        ("a", EVERYTHING, timedelta(days=4000), "expires"),
    ):
        with pytest.raises(InvalidInput) as refusal:
            locked.keys.create(name, scopes, lifetime)
        assert refusal.value.param == param
    assert locked.keys.list_keys() == before


# --- the store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), timedelta(days=1))
    yield made
    made.redis.close()


def test_the_indexes_forget_what_was_deleted_or_has_expired(queue: JobQueue) -> None:
    body = JobSpec.parse(spec())
    deleted, expired, kept = (queue.create(new_job_id(), body, "key_a").id for _ in range(3))
    nobodys = queue.create(new_job_id(), body).id
    assert queue.redis.zcard(OWNED) == 3
    queue.cancel(deleted, "key_a")
    queue.delete(deleted, "key_a")
    assert queue.redis.zcard(OWNED) == 2
    queue.redis.delete(f"c2i:job:{expired}")
    queue.prune()
    assert queue.redis.zrange(OWNED, 0, -1) == [f"key_a:{kept}".encode()]
    assert sorted(queue.redis.zrange("c2i:jobs", 0, -1)) == sorted([kept.encode(), nobodys.encode()])


def test_a_list_by_owner_reads_the_owners_records_alone(queue: JobQueue) -> None:
    body = JobSpec.parse(spec())
    for owner in ("key_a", "key_b", "key_c", ""):
        for _ in range(10):
            queue.create(new_job_id(), body, owner)
    mine = [queue.create(new_job_id(), body, "key_bb").id for _ in range(2)]
    queue.redis.config_resetstat()
    assert sorted(job.id for job in queue.list_jobs(20, owner="key_bb")) == sorted(mine)
    calls = queue.redis.info("commandstats")
    assert calls["cmdstat_hgetall"]["calls"] == 2
    assert queue.list_jobs(20, owner="key_") == []


# --- the command line --------------------------------------------------------------------------------------------


def c2i(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "REDIS_URL" and not name.startswith("C2I_")}
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        cwd=REPOSITORY,
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def create(data: Path, *options: str) -> dict[str, Any]:
    result = c2i("keys", "create", "--name", "someone", "--data", str(data), "--json", *options)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_keys_are_made_listed_and_revoked_beside_a_service_that_runs_or_not(data: Path) -> None:
    before = create(data, "--expires", "30d")  # no service: Redis is started for the moment
    assert before["scopes"] == ["read", "submit"]
    server = ServeProcess(data, "--workers", "0", env={"C2I_REQUIRE_KEYS": "1"})
    try:
        printed = c2i("keys", "create", "--name", "another", "--scopes", "read", "--data", str(data))
        during = printed.stdout.strip()
        assert printed.returncode == 0
        for text in (before["key"], during):
            assert server.http.get("/v1/jobs", headers={"Authorization": f"Bearer {text}"}).status_code == 200
        listed = c2i("keys", "list", "--data", str(data))
        assert before["id"] in listed.stdout
        assert "another" in listed.stdout
        assert before["key"] not in listed.stdout
        assert c2i("keys", "revoke", before["id"], "--data", str(data)).returncode == 0
        shown = {key["name"]: key for key in json.loads(c2i("keys", "list", "--data", str(data), "--json").stdout)}
        assert (shown["someone"]["state"], shown["another"]["state"]) == ("revoked", "usable")
        assert "key" not in shown["another"]
        # The client takes its key from the environment.
        asked = ("models", "--json", "--url", server.url)
        assert c2i(*asked, env={"C2I_KEY": during}).returncode == 0
        refused = c2i(*asked, env={"C2I_KEY": before["key"]})
        assert (refused.returncode, "revoked" in refused.stderr) == (2, True)
        assert c2i(*asked).returncode == 2
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "param"),
    [(("--expires", "soon"), "--expires"), (("--expires", "0d"), "expires"), (("--scopes", "write"), "--scopes")],
)
def test_a_command_that_is_wrong_is_said_with_what_to_try(data: Path, options: tuple[str, str], param: str) -> None:
    result = c2i("keys", "create", "--name", "someone", "--data", str(data), *options)
    assert (result.returncode, result.stdout) == (2, "")
    said, next_thing = result.stderr.strip().splitlines()
    assert said.startswith(f"error: {param}")
    assert next_thing.startswith("try: ")


def test_a_service_that_would_let_nobody_in_does_not_start(data: Path) -> None:
    result = c2i("serve", "--host", "0.0.0.0", "--port", "0", "--workers", "0", "--data", str(data))
    assert result.returncode == 2
    assert "c2i keys create" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_keys_that_are_revoked_or_have_expired_let_nobody_in(redis: EmbeddedRedis) -> None:
    with connect(redis.url) as client:
        keys = KeyStore(client)
        _, first = keys.create("a", EVERYTHING)
        keys.check_any_usable()
        keys.revoke(first.id)
        text, _ = keys.create("b", EVERYTHING, timedelta(microseconds=1))
        with pytest.raises(InvalidInput, match="c2i keys create"):
            keys.check_any_usable()
        with pytest.raises(Unauthenticated, match="expired"):
            keys.authenticate(text)


def test_on_an_address_that_others_reach_keys_are_in_force(data: Path) -> None:
    made = create(data)
    server = ServeProcess(data, "--workers", "0", "--host", "0.0.0.0")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/jobs").status_code == 401
        assert httpx.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {made['key']}"}).status_code == 200
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("host", "in_force"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True), ("a.example", True)],
)
def test_loopback_alone_goes_without_keys(host: str, in_force: bool) -> None:
    assert Settings(host=host).keys_in_force is in_force
    assert Settings(host=host, require_keys=True).keys_in_force


def test_a_redis_is_reached_where_it_runs_and_started_where_not(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    with reach_redis(settings) as url, connect(url) as first, reach_redis(settings) as again, connect(again) as second:
        first.set("a", "b")
        assert second.get("a") == b"b"
        assert first.info("server")["process_id"] == second.info("server")["process_id"]
    assert not embedded._answers(url)
    with reach_redis(Settings(data=tmp_path, redis_url="redis://elsewhere")) as url:
        assert url == "redis://elsewhere"


def test_a_key_that_is_none_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("c2i_ü", "c2i_\nX-Other: 1"):
        monkeypatch.setenv("C2I_KEY", key)
        with pytest.raises(InvalidInput) as refusal:
            Client("http://127.0.0.1:1")
        assert refusal.value.param == "C2I_KEY"
        assert key not in refusal.value.message

"""What one caller may take: each limit has a clear answer, and what `Retry-After` says is true."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from service import lengths, models
from service.embedded import EmbeddedRedis
from service.errors import InvalidInput, TooManyRequests
from service.jobs import JobSpec
from service.keys import KeyStore, Scope
from service.limits import LARGE_OF_A_CALLER, Rates, Submissions
from service.settings import Settings
from tests.live import Api, install, spec, wait_until


@contextmanager
def serving(folder: Path, server: EmbeddedRedis, **limits: Any) -> Iterator[Api]:
    """The API with these settings."""
    api = Api(folder, server.url, **limits)
    try:
        yield api
    finally:
        api.stop()


def test_requests_over_the_rate_are_told_how_long_to_wait_and_that_is_true(folder: Path, server: EmbeddedRedis) -> None:
    with serving(folder, server, max_requests_per_second=2) as api:
        answers = [api.http.get("/v1/jobs") for _ in range(12)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert [answer.status_code for answer in answers[:4]] == [200] * 4
        assert refused
        error = refused[0].json()["error"]
        assert error["code"] == "too_many_requests" and "2 requests a second" in error["message"]
        wait = int(refused[-1].headers["Retry-After"])
        assert wait >= 1
        served = lambda: api.http.get("/v1/jobs").status_code == 200  # noqa: E731
        wait_until(served, wait + 0.5, "a request is served after Retry-After seconds")
        assert [api.http.get(path).status_code for path in 9 * ["/healthz", "/readyz"]] == 18 * [200]


def test_a_key_has_its_own_rate(folder: Path, server: EmbeddedRedis) -> None:
    with serving(folder, server, max_requests_per_second=1, require_keys=True) as api:
        keys = KeyStore(api.service.queue.redis)
        first, second = (
            {"Authorization": f"Bearer {keys.create(name, frozenset({Scope.READ}))[0]}"} for name in ("first", "second")
        )
        assert 429 in [api.http.get("/v1/jobs", headers=first).status_code for _ in range(6)]
        assert api.http.get("/v1/jobs", headers=second).status_code == 200


def test_no_limit_holds_where_no_keys_are_in_force_and_none_was_set() -> None:
    assert Settings().rate_in_force == 0
    assert Settings(require_keys=True).rate_in_force == 100
    assert Settings(require_keys=True, max_requests_per_second=0).rate_in_force == 0
    rates = Rates(0)
    for _ in range(10_000):
        rates.take("")


def test_a_setting_that_is_empty_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in compose files, that pass on what may be set."""
    for name in ("C2I_MAX_WAITING_JOBS", "C2I_MAX_RUNNING_JOBS", "C2I_MAX_REQUESTS_PER_SECOND", "REDIS_URL"):
        monkeypatch.setenv(name, "")
    settings = Settings.load()
    assert (settings.max_waiting_jobs, settings.max_running_jobs, settings.redis_url) == (10_000, None, None)
    assert settings.rate_in_force == 0


def test_a_caller_that_waits_as_told_is_served() -> None:
    rates = Rates(1000)
    with pytest.raises(TooManyRequests) as caught:
        for _ in range(100_000):
            rates.take("a")
    rates.take("b")
    assert caught.value.retry_after == 1


def test_a_full_share_of_the_queue_is_refused_to_the_job_even_at_once(folder: Path, server: EmbeddedRedis) -> None:
    with serving(folder, server, max_waiting_jobs=5) as api, ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: api.http.post("/v1/jobs", json=spec()), range(20)))
        assert sorted(answer.status_code for answer in answers) == [202] * 5 + [429] * 15
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["message"].startswith("5 of your jobs wait already")
        assert len(list((api.settings.artifacts / "jobs").iterdir())) == 5, "no input of a refused job is kept"
        accepted = next(answer for answer in answers if answer.status_code == 202)
        api.http.post(f"/v1/jobs/{accepted.json()['id']}/cancel")
        assert api.http.post("/v1/jobs", json=spec()).status_code == 202


def test_more_large_bodies_than_a_caller_may_send_at_once_are_refused_and_the_others_taken(
    folder: Path, server: EmbeddedRedis
) -> None:
    submissions = Submissions()
    with ExitStack() as admitted:
        for declared in ("1000001", "", "16000000", "nonsense"):
            admitted.enter_context(submissions.admit("a", declared))
        with pytest.raises(TooManyRequests), submissions.admit("a", "2000000"):
            pass
        admitted.enter_context(submissions.admit("a", "1000000"))
        admitted.enter_context(submissions.admit("b", "2000000"))
    with submissions.admit("a", "2000000"):
        pass
    large = {**spec(), "metadata": {}, "examples": [{"prompt": "é" * 90_000, "completion": "b"}] * 8}
    with serving(folder, server) as api, ThreadPoolExecutor(12) as threads:
        with ExitStack() as held:
            for _ in range(LARGE_OF_A_CALLER):
                held.enter_context(api.service.submissions.admit("", ""))
            refused = api.http.post("/v1/jobs", json=large)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) >= 1
        answers = threads.map(lambda _: api.http.post("/v1/jobs", json=large), range(12))
        assert {answer.status_code for answer in answers} <= {422, 429}
        assert api.http.post("/v1/jobs", json=large).status_code == 422, "none is counted any more"


def test_tokens_are_counted_no_further_than_the_limit(tiny_models: Callable[..., Path], tmp_path: Path) -> None:
    install(tiny_models("llama"), tmp_path)
    model = models.resolve(tmp_path / "models", "tiny-llama")
    job = JobSpec.parse(spec(examples=[{"prompt": f"{k} " + "a b c d " * 5000, "completion": "b"} for k in range(30)]))
    whole = lengths.count(model, job.examples).total
    lengths.check_total(model, job, whole)
    with pytest.raises(InvalidInput, match=f"a job may have {whole - 1:,}"):
        lengths.check_total(model, job, whole - 1)
    with pytest.raises(InvalidInput, match="or more together") as caught:
        lengths.check_total(model, job, 10)
    assert int(caught.value.message.split()[3].replace(",", "")) < whole / 3


@pytest.mark.parametrize(
    ("limits", "status", "param", "words"),
    [
        ({"max_tokens": 20}, 422, "examples", "a job may have 20"),
        ({"max_model_parameters": 1000}, 422, "model", "of up to 1,000"),
    ],
)
def test_a_job_too_large_is_refused_with_its_size_and_the_limit(
    limits: dict[str, int], status: int, param: str, words: str, folder: Path, server: EmbeddedRedis
) -> None:
    with serving(folder, server, **limits) as api:
        answer = api.http.post("/v1/jobs", json=spec())
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["param"] == param
        assert words in error["message"]


def test_every_counted_route_documents_that_it_may_refuse(folder: Path, server: EmbeddedRedis) -> None:
    with serving(folder, server) as api:
        document = api.http.get("/openapi.json").json()
        operations = {
            f"{method} {path}": operation["responses"]
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        }
        counted = {name for name in operations if name.startswith(("get /v1/", "post /v1/", "delete /v1/"))}
        counted.remove("get /v1/service")  # the page asks it before it has a key
        assert len(counted) >= 10
        assert {name for name, answers in operations.items() if "429" in answers} >= counted
        assert {"413", "422", "429"} <= set(operations["post /v1/jobs"])
        assert not {"get /healthz", "get /readyz"} & {name for name in operations if "429" in operations[name]}

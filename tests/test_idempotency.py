"""`Idempotency-Key`: whatever is sent twice, or twenty times at once, there is one job."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import pytest

from service.idempotency import KEPT
from service.jobs import JobSpec
from service.keys import Scope
from service.records import new_job_id
from tests.live import Api, spec

NAME = "Idempotency-Key"
BODY = json.dumps(spec()).encode()
OTHER_BODY = json.dumps(spec(seed=1)).encode()


def send(api: Api, key: str | bytes | None, body: bytes = BODY, **headers: str) -> httpx.Response:
    named: dict[str, Any] = {} if key is None else {NAME: key}
    return api.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json", **named, **headers})


def created(response: httpx.Response) -> str:
    assert (response.status_code, "idempotent-replayed" in response.headers) == (202, False), response.text
    return str(response.json()["id"])


def replayed(response: httpx.Response) -> str:
    assert (response.status_code, response.headers.get("idempotent-replayed")) == (202, "true"), response.text
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    return str(response.json()["id"])


def refused(response: httpx.Response, status: int, code: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, NAME), error
    return str(error["message"])


def jobs(api: Api) -> set[str]:
    return {job["id"] for job in api.http.get("/v1/jobs", params={"limit": 100}).json()["data"]}


def test_the_same_key_and_body_are_the_same_job_in_whatever_state_it_is(api: Api) -> None:
    job_id = created(send(api, "a-key"))
    assert replayed(send(api, "a-key")) == job_id
    api.http.post(f"/v1/jobs/{job_id}/cancel")
    again = send(api, "a-key")
    assert replayed(again) == job_id
    assert again.json()["status"] == "cancelled"
    assert jobs(api) == {job_id}


def test_the_same_key_with_another_body_is_refused_and_creates_nothing(api: Api) -> None:
    job_id = created(send(api, "a-key"))
    assert "another body" in refused(send(api, "a-key", OTHER_BODY), 409, "conflict")
    assert jobs(api) == {job_id}
    assert replayed(send(api, "a-key")) == job_id


def test_other_keys_and_none_create_other_jobs(api: Api) -> None:
    keys = ("a", "A", "b", None, None, "~" * 255, "!")
    assert len({created(send(api, key)) for key in keys}) == len(keys)


def test_a_request_that_was_refused_does_not_use_up_its_key(api: Api) -> None:
    assert send(api, "a-key", b"{}").status_code == 422
    assert created(send(api, "a-key"))


def test_a_key_of_a_deleted_job_is_refused_in_words(api: Api) -> None:
    job_id = created(send(api, "a-key"))
    api.http.post(f"/v1/jobs/{job_id}/cancel")
    assert api.http.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert "deleted" in refused(send(api, "a-key"), 409, "conflict")
    assert jobs(api) == set()


@pytest.mark.parametrize("key", ["", "a" * 256, "two words", b"caf\xc3\xa9", b"tab\there"])
def test_a_key_of_another_form_is_refused_by_its_header_name(shared_api: Api, key: str | bytes) -> None:
    message = refused(send(shared_api, key), 422, "invalid_request")
    assert "1 to 255 visible ASCII" in message


def test_twenty_requests_at_once_create_one_job_and_leave_one_input(api: Api) -> None:
    for round_ in range(5):
        before, inputs = jobs(api), stored(api)
        barrier = Barrier(20)

        def request(key: str = f"round-{round_}", barrier: Barrier = barrier) -> httpx.Response:
            with httpx.Client(base_url=api.url, timeout=30) as http:
                barrier.wait()
                headers = {NAME: key, "Content-Type": "application/json"}
                return http.post("/v1/jobs", content=BODY, headers=headers)

        with ThreadPoolExecutor(20) as pool:
            answers = [future.result() for future in [pool.submit(request) for _ in range(20)]]
        assert {answer.status_code for answer in answers} == {202}
        (job_id,) = {answer.json()["id"] for answer in answers}
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19
        assert jobs(api) - before == {job_id}
        assert len(stored(api) - inputs) == 1
        assert api.service.queue.deliveries.count == round_ + 1


def stored(api: Api) -> set[str]:
    """Every file of the artifact store that belongs to a job."""
    return {str(path) for path in api.settings.artifacts.rglob("*") if path.is_file()}


def test_a_request_that_lost_the_race_removes_its_input(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = created(send(api, "a-key"))
    inputs = stored(api)
    # It looks before the other has written, and finds out in the transaction.
    monkeypatch.setattr(api.service.queue, "find_claimed", lambda claim: None)
    assert replayed(send(api, "a-key")) == job_id
    assert stored(api) == inputs
    refused(send(api, "a-key", OTHER_BODY), 409, "conflict")
    assert stored(api) == inputs


def test_the_claim_lapses_after_a_day_and_does_not_hold_the_key_itself(api: Api) -> None:
    job_id = created(send(api, "a-secret-order-number"))
    redis = api.service.queue.redis
    (name,) = redis.keys("c2i:idempotency:*")
    assert KEPT.total_seconds() - 60 < redis.ttl(name) <= KEPT.total_seconds()
    assert b"a-secret-order-number" not in name
    redis.delete(name)
    assert created(send(api, "a-secret-order-number")) != job_id


def test_the_same_key_of_two_owners_is_two_jobs(api: Api) -> None:
    locked = Api(api.settings.data, api.redis_url, require_keys=True)
    try:
        scopes = frozenset({Scope.SUBMIT, Scope.READ})
        one, two = (f"Bearer {locked.service.keys.create(name, scopes)[0]}" for name in ("one", "two"))
        first = created(send(locked, "a-key", Authorization=one))
        second = created(send(locked, "a-key", OTHER_BODY, Authorization=two))
        assert first != second
        assert replayed(send(locked, "a-key", Authorization=one)) == first
        assert replayed(send(locked, "a-key", OTHER_BODY, Authorization=two)) == second
        assert send(locked, "two words").status_code == 401  # a stranger is told nothing of the header
    finally:
        locked.stop()


def test_a_claim_is_written_with_the_job_or_not_at_all(api: Api) -> None:
    from service.idempotency import Claim

    queue = api.service.queue
    claim = Claim.of("key_a", "a-key", BODY)
    job_id = new_job_id()
    assert queue.find_claimed(claim) is None
    assert queue.create(job_id, JobSpec.parse(spec()), "key_a", claim).id == job_id
    assert queue.create(job_id, JobSpec.parse(spec()), "key_a", claim).id == job_id  # its first answer was lost
    assert queue.create(new_job_id(), JobSpec.parse(spec()), "key_a", claim).id == job_id
    found = queue.find_claimed(claim)
    assert found is not None
    assert found.id == job_id


def test_the_header_is_documented(shared_api: Api) -> None:
    operation = shared_api.http.get("/openapi.json").json()["paths"]["/v1/jobs"]["post"]
    (header,) = [one for one in operation["parameters"] if one["in"] == "header"]
    assert (header["name"], header["required"]) == (NAME, False)
    assert "409" in operation["responses"]

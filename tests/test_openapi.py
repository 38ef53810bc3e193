"""Every operation of the OpenAPI document, tried by schemathesis: no fault, no answer that it does not name."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.embedded import EmbeddedRedis
from service.keys import Scope
from tests.fuzz.__main__ import schemathesis
from tests.fuzz.bodies import bodies
from tests.live import Api, spec


@pytest.mark.parametrize("in_force", [False, True])
def test_no_operation_answers_what_its_document_does_not_name(
    in_force: bool, folder: Path, server: EmbeddedRedis
) -> None:
    api = Api(folder, server.url, require_keys=in_force, max_requests_per_second=0)
    try:
        key, _ = api.service.keys.create("all", frozenset(Scope))
        headers = {"Authorization": f"Bearer {key}"} if in_force else {}
        jobs = [api.http.post("/v1/jobs", json=spec(), headers=headers).json()["id"] for _ in range(8)]
        done = schemathesis(api.url, key if in_force else None, 2, 0, folder, jobs)
        assert done.returncode == 0, done.stdout[-3000:]
    finally:
        api.stop()


def test_random_bodies_are_answered_as_documented(shared_api: Api) -> None:
    for kind, body in bodies(150, seed=1):
        answer = shared_api.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (202, 404, 413, 422), (kind, answer.text)

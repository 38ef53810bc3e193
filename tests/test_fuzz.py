"""Whatever is sent, the answer is never a fault of ours and always of one shape."""

from __future__ import annotations

import json
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.live import Api, spec

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    *spec(),
    "validation",
    "test",
    "passes",
    "strategy",
    "strategy_options",
    "objective",
    "seed",
    "prompt_format",
    "metadata",
    "x",
]

quietly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(api: Api, body: bytes) -> None:
    response = api.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (202, 404, 422), response.text
    if response.status_code != 202:
        assert set(response.json()["error"]) == {"code", "message", "param"}


@quietly
@given(st.binary(max_size=200))
def test_any_bytes(shared_api: Api, body: bytes) -> None:
    check(shared_api, body)


@quietly
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3))
def test_any_values_for_the_fields(shared_api: Api, changes: dict[str, object]) -> None:
    check(shared_api, json.dumps({**spec(), **changes}).encode())


@quietly
@given(st.integers(0, 11), st.dictionaries(st.sampled_from(["prompt", "completion", "choices"]), values, min_size=1))
def test_any_values_in_an_example(shared_api: Api, index: int, changes: dict[str, object]) -> None:
    body = spec()
    body["examples"][index] |= changes
    check(shared_api, json.dumps(body).encode())


@quietly
@given(st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=30))
def test_any_job_id(shared_api: Api, job_id: str) -> None:
    for path in ("", "/events", "/report", "/files/x"):
        response = shared_api.http.get(f"/v1/jobs/{quote(job_id, safe='')}{path}")
        assert response.status_code in (200, 404, 307), response.text

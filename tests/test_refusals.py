"""Everything that `POST /v1/jobs` refuses, one by one, over HTTP: the status, the code and the field named."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import MAX_BODY_BYTES
from tests import tiny
from tests.live import Api, install, spec

JSON = {"Content-Type": "application/json"}


def examples(index: int = 3, count: int = 12, **changes: Any) -> list[dict[str, Any]]:
    """Valid examples but for the changes to one of them."""
    made = tiny.learnable_examples(count)
    made[index] = {name: value for name, value in (made[index] | changes).items() if value is not ...}
    return made


def refused(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    """Check the one body shape; the message."""
    body = response.json()
    assert list(body) == ["error"], body
    assert set(body["error"]) == {"code", "message", "param"}
    assert (response.status_code, body["error"]["code"], body["error"]["param"]) == (status, code, param), body
    assert body["error"]["message"]
    return str(body["error"]["message"])


SAME = {"prompt": "Item 0: answer", "completion": " no", "choices": [" yes", " no", " red"]}

COMPRESS = {"goal": "compress", "strategy": "layers", "target": {"parameters": 0.8}}
SYSTEM = {"role": "system", "content": "Be brief."}

BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("no examples", {"examples": []}, "examples"),
    ("examples left out", {"examples": ...}, "examples"),
    ("too few examples", {"examples": tiny.learnable_examples(7)}, "examples"),
    ("a wrong example among too few", {"examples": [SAME | {"completion": " blue"}]}, "examples[0].completion"),
    ("an object for examples", {"examples": {}}, "examples"),
    ("null for an example", {"examples": [None] * 12}, "examples[0]"),
    ("an empty prompt", {"examples": examples(prompt="")}, "examples[3].prompt"),
    ("a blank prompt", {"examples": examples(prompt=" \n")}, "examples[3].prompt"),
    ("no prompt", {"examples": examples(prompt=...)}, "examples[3].prompt"),
    ("a number for a prompt", {"examples": examples(prompt=7)}, "examples[3].prompt"),
    ("an empty completion", {"examples": examples(completion="")}, "examples[3].completion"),
    ("a completion not among the choices", {"examples": examples(completion=" blue")}, "examples[3].completion"),
    ("a completion without its blank", {"examples": examples(completion="yes")}, "examples[3].completion"),
    ("no choices in the list", {"examples": examples(choices=[])}, "examples[3].choices"),
    ("a single choice", {"examples": examples(choices=[" yes"])}, "examples[3].choices"),
    ("a duplicate choice", {"examples": examples(choices=[" yes", " no", " yes"])}, "examples[3].choices[2]"),
    ("an empty choice", {"examples": examples(choices=[" yes", ""])}, "examples[3].choices[1]"),
    ("contradictory duplicates", {"examples": [*tiny.learnable_examples(12), SAME]}, "examples[12].completion"),
    ("a test example that was trained on", {"test": tiny.learnable_examples(1)}, "test[0].prompt"),
    ("an empty test split", {"test": []}, "test"),
    ("an empty validation split", {"validation": []}, "validation"),
    ("an unknown field of an example", {"examples": examples(label="x")}, "examples[3].label"),
    ("more than 10,000 examples", {"examples": tiny.learnable_examples(10_001)}, "examples"),
    (
        "more than 10,000 over the lists",
        {"examples": tiny.learnable_examples(10_000), "test": [{"prompt": "p", "completion": "c"}]},
        "examples",
    ),
    ("an unknown field", {"epochs": 3}, "epochs"),
    ("turns without a chat", {"examples": examples(turns=[SYSTEM])}, "examples[3].turns"),
    (
        "a turn of nobody",
        {"prompt_format": "chat", "examples": examples(turns=[{"content": ""}])},
        "examples[3].turns[0].role",
    ),
    (
        "a contradiction behind the same turns",
        {"prompt_format": "chat", "examples": [*examples(0, turns=[SYSTEM]), SAME | {"turns": [SYSTEM]}]},
        "examples[12].completion",
    ),
    ("an unknown strategy", {"strategy": "magic"}, "strategy"),
    ("an option of another strategy", {"strategy_options": {"matrices": 3}}, "strategy_options.matrices"),
    ("options that are a list", {"strategy": "laser", "strategy_options": []}, "strategy_options"),
    (
        "a retention of all",
        {"strategy": "laser", "strategy_options": {"retentions": [0.5, 1]}},
        "strategy_options.retentions[1]",
    ),
    ("no retention", {"strategy": "c2i", "strategy_options": {"retentions": []}}, "strategy_options.retentions"),
    ("half a row block", {"strategy_options": {"row_blocks": 1.5}}, "strategy_options.row_blocks"),
    (
        "a row block of none",
        {"strategy": "c2i", "strategy_options": {"row_blocks": [1, 0]}},
        "strategy_options.row_blocks[1]",
    ),
    ("an unknown sign", {"strategy": "c2i", "strategy_options": {"sign": "+"}}, "strategy_options.sign"),
    ("an empty sample", {"strategy": "laser", "strategy_options": {"sample": 0}}, "strategy_options.sample"),
    ("an unknown goal", {"goal": "shrink"}, "goal"),
    ("a target of no goal", {"target": {"parameters": 0.8}}, "target"),
    ("no target of compress", {"goal": "compress", "strategy": "layers"}, "target"),
    ("a target of everything", COMPRESS | {"target": {"parameters": 1.0}}, "target.parameters"),
    ("two targets", COMPRESS | {"target": {"parameters": 0.8, "bytes": 0.8}}, "target"),
    ("no target in it", COMPRESS | {"target": {}}, "target"),
    ("an unknown target", COMPRESS | {"target": {"layers": 0.8}}, "target.layers"),
    ("a target in strange words", COMPRESS | {"target": "80 %"}, "target"),
    ("a target in words that is all", COMPRESS | {"target": "bytes=1.5"}, "target.bytes"),
    ("compress by components", COMPRESS | {"strategy": "components"}, "strategy"),
    ("compress by laser", COMPRESS | {"strategy": "laser"}, "strategy"),
    ("compress by c2i", COMPRESS | {"strategy": "c2i"}, "strategy"),
    ("compress by nothing that it names", {"goal": "compress"}, "strategy"),
    ("compress within a drift", COMPRESS | {"max_drift": 0.5}, "max_drift"),
    ("compress by sub-layers", COMPRESS | {"strategy_options": {"parts": "both"}}, "strategy_options.parts"),
    (
        "compress by another score",
        COMPRESS | {"strategy_options": {"score": "block_influence"}},
        "strategy_options.score",
    ),
    (
        "compress by single heads",
        COMPRESS | {"strategy": "heads", "strategy_options": {"groups": False}},
        "strategy_options.groups",
    ),
    (
        "compress by a mix with heads",
        COMPRESS | {"strategy": "mixed", "strategy_options": {"kinds": ["layers", "heads"]}},
        "strategy_options.kinds",
    ),
    (
        "compress by 2:4",
        COMPRESS | {"strategy": "blocks", "strategy_options": {"pattern": "2:4"}},
        "strategy_options.pattern",
    ),
    ("fewer bytes by tiles", COMPRESS | {"strategy": "blocks", "target": {"bytes": 0.8}}, "target"),
    ("an unknown objective", {"objective": "magic"}, "objective"),
    ("an unknown prompt format", {"prompt_format": "magic"}, "prompt_format"),
    ("no passes", {"passes": 0}, "passes"),
    ("nine passes", {"passes": 9}, "passes"),
    ("half a pass", {"passes": 1.5}, "passes"),
    ("passes in words", {"passes": "2"}, "passes"),
    ("true passes", {"passes": True}, "passes"),
    ("a negative seed", {"seed": -1}, "seed"),
    ("a huge seed", {"seed": 2**64}, "seed"),
    ("no drift allowed", {"max_drift": 0}, "max_drift"),
    ("a drift in words", {"max_drift": "0.1"}, "max_drift"),
    ("no model", {"model": ...}, "model"),
    ("a model with dots", {"model": "../secret"}, "model"),
    ("a model with dots inside", {"model": "owner/.."}, "model"),
    ("a URL", {"model": "https://example.com/model"}, "model"),
    ("an absolute path", {"model": "/etc/passwd"}, "model"),
    ("a model with a backslash", {"model": "a\\b"}, "model"),
    ("a model with a line feed", {"model": "tiny-llama\n"}, "model"),
    ("an empty model", {"model": ""}, "model"),
    ("metadata that is no text", {"metadata": {"a": 1}}, "metadata.a"),
    ("too much metadata", {"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ("an empty metadata key", {"metadata": {"": "x"}}, "metadata."),
]


@pytest.mark.parametrize(("what", "changes", "param"), BAD_FIELDS, ids=[case[0] for case in BAD_FIELDS])
def test_bad_fields_are_refused_by_name(shared_api: Api, what: str, changes: dict[str, Any], param: str) -> None:
    body = {name: value for name, value in spec(**changes).items() if value is not ...}
    refused(shared_api.http.post("/v1/jobs", json=body), 422, "invalid_request", param)


NOT_JSON: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("cut off", b'{"model": "tiny-llama"'),
    ("an array", b"[]"),
    ("a string", b'"x"'),
    ("null", b"null"),
    ("NaN", json.dumps(spec()).encode()[:-1] + b', "seed": NaN}'),
    ("infinite", json.dumps(spec()).encode()[:-1] + b', "passes": 1e999}'),
    ("a huge integer", json.dumps(spec()).encode()[:-1] + b', "seed": ' + b"9" * 10_000 + b"}"),
    ("half a surrogate pair", json.dumps(spec()).encode()[:-1] + b', "metadata": {"a": "\\ud800"}}'),
    ("deep nesting", b'{"model":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    ("no UTF-8", b'{"model": "\xff\xfe"}'),
    ("two documents", b"{} {}"),
    ("binary", bytes(range(256))),
]


@pytest.mark.parametrize(("what", "body"), NOT_JSON, ids=[case[0] for case in NOT_JSON])
def test_what_is_no_json_object_is_422(shared_api: Api, what: str, body: bytes) -> None:
    response = shared_api.http.post("/v1/jobs", content=body, headers=JSON)
    assert response.status_code == 422
    refused(response, 422, "invalid_request", response.json()["error"]["param"])


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_wrong_content_type_is_415(shared_api: Api, kind: str) -> None:
    response = shared_api.http.post("/v1/jobs", content=json.dumps(spec()), headers={"Content-Type": kind})
    refused(response, 415, "wrong_content_type", None)


def test_a_charset_beside_the_content_type_is_fine(shared_api: Api) -> None:
    headers = {"Content-Type": "application/JSON; charset=utf-8"}
    assert shared_api.http.post("/v1/jobs", content=json.dumps(spec()), headers=headers).status_code == 202


def test_a_body_over_16_mb_is_413_declared_or_chunked(shared_api: Api) -> None:
    whole = b" " * (MAX_BODY_BYTES + 1)
    refused(shared_api.http.post("/v1/jobs", content=whole, headers=JSON), 413, "payload_too_large", None)
    chunks = (whole[i : i + 100_000] for i in range(0, len(whole), 100_000))
    refused(shared_api.http.post("/v1/jobs", content=chunks, headers=JSON), 413, "payload_too_large", None)


def test_a_body_of_just_16_mb_is_read(shared_api: Api) -> None:
    body = json.dumps(spec()).encode()
    response = shared_api.http.post("/v1/jobs", content=body.ljust(MAX_BODY_BYTES), headers=JSON)
    assert response.status_code == 202


def test_an_unknown_model_is_404_and_says_how_to_add_it(shared_api: Api) -> None:
    for model in ("nobody", "owner/nobody"):
        message = refused(shared_api.http.post("/v1/jobs", json=spec(model=model)), 404, "model_not_found", "model")
        assert "c2i models add" in message


def test_an_example_longer_than_the_context_is_named_with_its_tokens(shared_api: Api) -> None:
    long = "x 7" * tiny.CONTEXT
    response = shared_api.http.post("/v1/jobs", json=spec(examples=examples(prompt=long)))
    message = refused(response, 422, "invalid_request", "examples[3].prompt")
    assert f"context is {tiny.CONTEXT}" in message
    assert any(int(word.replace(",", "")) > tiny.CONTEXT for word in message.split() if word[0].isdigit())
    response = shared_api.http.post("/v1/jobs", json=spec(test=[{"prompt": "p", "completion": long}]))
    refused(response, 422, "invalid_request", "test[0].prompt")


def test_an_example_that_just_fits_is_taken(shared_api: Api) -> None:
    # The tiny tokenizer knows no merge of Chinese: three tokens a character; the longest completion is a few.
    response = shared_api.http.post("/v1/jobs", json=spec(examples=examples(prompt="日" * 80)))
    assert response.status_code == 202
    refused(
        shared_api.http.post("/v1/jobs", json=spec(examples=examples(prompt="日" * 86))),
        422,
        "invalid_request",
        "examples[3].prompt",
    )


def _config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lead_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")


def _cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "only pickle weights": (_only_pickle, "safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "half a file of weights": (_cut, "model.safetensors"),
    "a missing shard": (_missing_shard, "gone.safetensors"),
    "a link out of the folder": (_lead_out, "link"),
    "auto_map": (lambda folder: _config(folder, lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "auto_map"),
    "a nested auto_map": (lambda folder: _config(folder, lambda c: c.update(a=[{"auto_map": {}}])), "auto_map"),
    "auto_map of the tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'),
        "auto_map",
    ),
    "a private key": (
        lambda folder: _config(folder, lambda c: c.update(_attn_implementation_internal="x/y")),
        "_attn_implementation_internal",
    ),
    "a nested private key": (lambda folder: _config(folder, lambda c: c.update(a={"_b": 1})), "_b"),
    "a broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "a list for a config": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "a deep config": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "config.json"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_model_that_is_not_safe_to_load_is_refused(
    shared_api: Api, tiny_models: Callable[..., Path], what: str
) -> None:
    spoil, named = BAD_MODELS[what]
    folder = install(tiny_models("llama"), shared_api.settings.data, "owner/spoiled")
    try:
        assert shared_api.http.post("/v1/jobs", json=spec(model="owner/spoiled")).status_code == 202
        spoil(folder)
        response = shared_api.http.post("/v1/jobs", json=spec(model="owner/spoiled"))
        assert named in refused(response, 422, "unusable_model", "model")
        assert str(shared_api.settings.data) not in response.text
        listed = {model["id"]: model for model in shared_api.http.get("/v1/models").json()["data"]}
        assert listed["owner/spoiled"]["error"]["code"] == "unusable_model"
        assert listed["tiny-llama"]["error"] is None
    finally:
        shutil.rmtree(folder)


def test_nothing_is_stored_of_a_refused_job(api: Api, data: Path) -> None:
    api.http.post("/v1/jobs", json=spec(model="nobody"))
    api.http.post("/v1/jobs", json=spec(passes=9))
    assert api.http.get("/v1/jobs").json()["data"] == []
    assert list((data / "artifacts" / "jobs").iterdir()) == []


def test_a_thousand_examples_are_accepted_in_under_100_ms(shared_api: Api) -> None:
    body = json.dumps(spec(examples=tiny.learnable_examples(1000)))
    times = []
    for _ in range(7):
        began = time.process_time()  # the API runs in this process, and others may keep the machine busy
        assert shared_api.http.post("/v1/jobs", content=body, headers=JSON).status_code == 202
        times.append(time.process_time() - began)
    # The median: the first reads the model.
    assert sorted(times)[3] < 0.05, times


def test_routes_methods_and_parameters_that_do_not_exist_answer_in_the_same_shape(shared_api: Api) -> None:
    http = shared_api.http
    refused(http.get("/nowhere"), 404, "not_found", None)
    refused(http.get("/v1/jobs/..%2f..%2fetc"), 404, "not_found", None)
    refused(http.put("/v1/jobs"), 405, "method_not_allowed", None)
    refused(http.get("/v1/jobs/nonsense"), 404, "job_not_found", None)
    refused(http.get("/v1/jobs/job_00000000000000000000"), 404, "job_not_found", None)
    refused(http.delete("/v1/jobs/job_00000000000000000000"), 404, "job_not_found", None)
    refused(http.post("/v1/jobs/job_00000000000000000000/cancel"), 404, "job_not_found", None)
    refused(http.get("/v1/jobs/job_00000000000000000000/events"), 404, "job_not_found", None)
    refused(http.get("/v1/jobs/job_00000000000000000000/adapter.zip"), 404, "job_not_found", None)
    refused(http.get("/v1/jobs?limit=0"), 422, "invalid_request", "limit")
    refused(http.get("/v1/jobs?limit=many"), 422, "invalid_request", "limit")
    refused(http.get("/v1/jobs?after=nonsense"), 422, "invalid_request", "after")
    job_id = shared_api.submit()
    for wait in ("-1", "61", "nan", "inf", "soon"):
        refused(http.get(f"/v1/jobs/{job_id}?wait={wait}"), 422, "invalid_request", "wait")
    for after in ("nonsense", "1", "-", "1-2-3", "99999999999999999999-0"):
        refused(http.get(f"/v1/jobs/{job_id}/events?after={after}"), 422, "invalid_request", "after")


def test_the_documentation_names_every_error_and_the_body(shared_api: Api) -> None:
    schema = shared_api.http.get("/openapi.json").json()
    created = schema["paths"]["/v1/jobs"]["post"]
    assert {"202", "404", "413", "415", "422", "500", "503"} <= set(created["responses"])
    reference = created["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/JobSpec"
    for path in schema["paths"].values():
        for route in path.values():
            for status, response in route["responses"].items():
                if status >= "4":
                    body = response["content"]["application/json"]["schema"]["$ref"]
                    assert body == "#/components/schemas/ErrorBody", (status, route["summary"])
    # Every reference leads somewhere.
    names = schema["components"]["schemas"]
    for part in json.dumps(schema).split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in names

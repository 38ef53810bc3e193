"""The whole way with nothing stood in: `c2i serve`, a job over HTTP, real mathematics, files that others can load."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import tiny
from tests.live import REPOSITORY, ServeProcess, install, spec, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> Iterator[ServeProcess]:
    data = tmp_path_factory.mktemp("served")
    install(tiny_models("gpt2"), data, "tiny-gpt2")
    install(tiny_models("llama"), data, "owner/tiny.llama")
    install(tiny_models("roberta"), data, "tiny-roberta")
    install(tiny_models("llama"), data, "no-template")
    (data / "models" / "no-template" / "chat_template.jinja").unlink()
    running = ServeProcess(data)
    yield running
    assert running.stop() == 0


def run(http: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = http.post("/v1/jobs", json=spec(**changes))
    assert response.status_code == 202, response.text
    return dict(http.get(f"/v1/jobs/{response.json()['id']}", params={"wait": 60}).json())


def unzip(http: httpx.Client, url: str, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(http.get(url).content)) as archive:
        archive.extractall(folder)
        return folder / archive.namelist()[0].partition("/")[0]


@pytest.fixture(scope="module")
def job(server: ServeProcess) -> dict[str, Any]:
    """A job on a tiny GPT-2 whose plan removes something."""
    return run(server.http, model="tiny-gpt2", examples=tiny.learnable_examples(200), passes=2)


def test_a_job_succeeds_with_a_result_that_its_report_bears_out(server: ServeProcess, job: dict[str, Any]) -> None:
    assert job["status"] == "succeeded", job["error"]
    assert job["result"]["removed"]["components"] > 0
    report = server.http.get(f"/v1/jobs/{job['id']}/report").json()
    for name in ("improved", "verdict", "difference", "removed"):
        assert report[name] == job["result"][name]
    assert report["model"]["id"] == "tiny-gpt2"
    revisions = {model["id"]: model["revision"] for model in server.http.get("/v1/models").json()["data"]}
    assert report["model"]["revision"] == revisions["tiny-gpt2"]
    assert report["verification"]["adapter"] < 1e-3
    assert report["verification"]["model"] < 1e-3
    assert sum(len(entry["components"]) for entry in report["plan"]) == report["removed"]["components"]


def test_events_tell_the_stages_in_order_and_the_percent_never_falls(server: ServeProcess, job: dict[str, Any]) -> None:
    events = server.http.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    percents = [event["progress"]["percent"] for event in events]
    assert percents == sorted(percents)
    stages = [event["progress"]["stage"] for event in events if event["progress"]["stage"]]
    assert stages[0] == "loading"
    assert {"backward", "searching", "publishing"} <= set(stages)


def test_an_idle_worker_starts_a_job_at_once(server: ServeProcess, job: dict[str, Any]) -> None:
    def idle() -> bool:
        (worker,) = server.http.get("/v1/workers").json()["data"]
        age = datetime.now(UTC) - datetime.fromisoformat(worker["seen_at"])
        # It announces itself and looks for a job. One that looked once a second would now be far from its next look.
        return worker["state"] == "idle" and 0.3 < age.total_seconds() < 0.5

    def waited() -> float:
        wait_until(idle, 30, "the worker has just found nothing to do")
        fresh = run(server.http, model="tiny-gpt2", examples=tiny.learnable_examples(40))
        created, started = (datetime.fromisoformat(fresh[name]) for name in ("created_at", "started_at"))
        return (started - created).total_seconds()

    # The least of some, since the machine may be doing something else.
    assert any(waited() < 0.3 for _ in range(5))


def test_a_masked_language_model_is_listed_adapted_and_told_where_a_mask_is_missing(server: ServeProcess) -> None:
    listed = {model["id"]: model.get("mask_token") for model in server.http.get("/v1/models").json()["data"]}
    assert (listed["tiny-roberta"], listed["tiny-gpt2"]) == ("<mask>", None)
    examples = [row | {"prompt": f"{row['prompt']} <mask>."} for row in tiny.learnable_examples(60)]
    done = run(server.http, model="tiny-roberta", examples=examples)
    assert done["status"] == "succeeded", done["error"]
    examples[3]["prompt"] = "no place for an answer"
    refused = server.http.post("/v1/jobs", json=spec(model="tiny-roberta", examples=examples))
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "examples[3].prompt"
    assert "<mask>" in refused.json()["error"]["message"]


# PEFT asks transformers for what transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_adapter_on_the_base_is_the_merged_model(
    server: ServeProcess, job: dict[str, Any], tmp_path: Path, tiny_models: Callable[..., Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = unzip(server.http, f"/v1/jobs/{job['id']}/adapter.zip", tmp_path) / "adapter"
    merged = unzip(server.http, f"/v1/jobs/{job['id']}/model.zip", tmp_path) / "model"
    base_folder = tiny_models("gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (base_folder / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert whole.dtype == base.dtype
    tokens = AutoTokenizer.from_pretrained(merged)("Item 3: answer yes", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        after = whole(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, adapter)(input_ids=tokens).logits
    assert (after - before).abs().max() > 1e-2
    assert (after - adapted).abs().max() < 1e-3


def test_the_same_seed_gives_the_same_plan_and_files(server: ServeProcess, job: dict[str, Any]) -> None:
    again = run(server.http, model="tiny-gpt2", examples=tiny.learnable_examples(200), passes=2)
    first, second = (server.http.get(f"/v1/jobs/{one['id']}/report").json() for one in (job, again))
    assert first["plan"] == second["plan"]
    files = [
        {file["path"]: file["sha256"] for file in server.http.get(f"/v1/jobs/{one['id']}/files").json()["data"]}
        for one in (job, again)
    ]
    for path in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert files[0][path] == files[1][path]


@pytest.mark.parametrize(
    "changes",
    [
        {"examples": tiny.learnable_examples(8)},
        {"prompt_format": "chat"},
        {"objective": "completion"},
        {"examples": [{"prompt": f"Number {i}:", "completion": f" {i % 5}"} for i in range(20)]},
        {"test": [{"prompt": "Unseen", "completion": " yes", "choices": [" yes", " no"]}] * 3},
    ],
    ids=["eight examples", "chat", "completion", "open answers", "a test split"],
)
def test_other_kinds_of_jobs_succeed(server: ServeProcess, changes: dict[str, Any]) -> None:
    done = run(server.http, model="owner/tiny.llama", **changes)
    assert done["status"] == "succeeded", done["error"]


def test_what_only_the_worker_can_see_fails_with_the_same_kind_of_error(server: ServeProcess) -> None:
    chat = run(server.http, model="no-template", prompt_format="chat")
    assert (chat["status"], chat["error"]["code"], chat["error"]["param"]) == (
        "failed",
        "invalid_request",
        "prompt_format",
    )
    # Bare it fits; what the chat's template adds makes it too long.
    examples = tiny.learnable_examples(12)
    examples[3]["prompt"] = "日" * 84
    long = run(server.http, model="owner/tiny.llama", prompt_format="chat", examples=examples)
    assert (long["status"], long["error"]["param"]) == ("failed", "examples[3].prompt")
    assert f"context is {tiny.CONTEXT}" in long["error"]["message"]


def test_a_model_that_is_damaged_after_it_was_queued_fails_in_words(
    server: ServeProcess, tiny_models: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    install(tiny_models("llama"), data)
    alone = ServeProcess(data, "--workers", "0")
    try:
        job_id = alone.http.post("/v1/jobs", json=spec()).json()["id"]
    finally:
        assert alone.stop() == 0
    shutil.rmtree(data / "models" / "tiny-llama")
    again = ServeProcess(data)
    try:
        error = again.http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    finally:
        assert again.stop() == 0


def test_a_real_adaptation_is_cancelled_in_two_seconds(server: ServeProcess) -> None:
    examples = tiny.learnable_examples(3000)
    job_id = server.http.post("/v1/jobs", json=spec(model="tiny-gpt2", examples=examples, passes=8)).json()["id"]
    wait_until(lambda: server.http.get(f"/v1/jobs/{job_id}").json()["progress"]["stage"], 30, "the job is at work")
    began = time.monotonic()
    server.http.post(f"/v1/jobs/{job_id}/cancel")
    assert server.http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()["status"] == "cancelled"
    assert time.monotonic() - began < 2


def test_the_workers_parent_imports_and_never_computes() -> None:
    """As `c2i worker` does before it forks: one Python thread, no CUDA."""
    script = (
        "import threading, torch; import workers.worker, workers.adaptation;"
        "assert threading.active_count() == 1; assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_job_is_tried_by_a_process_that_the_first_try_starts(server: ServeProcess, job: dict[str, Any]) -> None:
    def answerers() -> list[psutil.Process]:
        return [child for child in psutil.Process(server.process.pid).children() if "--tries" in child.cmdline()]

    assert not answerers()
    asked = server.http.post(f"/v1/jobs/{job['id']}/tries", json={"prompt": "Item 3: answer", "max_tokens": 3})
    assert asked.status_code == 202
    found = asked.json()
    while found["status"] in ("queued", "running"):
        found = server.http.get(asked.headers["location"], params={"wait": 30}).json()
    assert found["status"] == "succeeded", found["error"]
    assert found["base"]["text"]
    assert found["adapted"]["text"]
    assert len(answerers()) == 1
    # It is none of those who take jobs.
    assert server.http.get("/readyz").json()["workers"] == 1

"""The stock `openai` client, unmodified, against the service with real workers on a tiny model."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from service.keys import Scope
from service.reports import Report
from tests import live, tiny
from tests.live import Api, ServeProcess, WorkerProcess, wait_until

EVERYTHING = frozenset({Scope.SUBMIT, Scope.READ})


OPENED = ExitStack()


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    """Every client that a test made is closed in the end."""
    with OPENED:
        yield


def client(url: str, key: str = "any") -> OpenAI:
    return OPENED.enter_context(OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))


def lines(*objects: Any) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)


def chats(count: int = 12) -> list[dict[str, Any]]:
    """The small task as OpenAI's training files have it."""
    return [
        {
            "messages": [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["completion"]},
            ]
        }
        for one in tiny.learnable_examples(count)
    ]


def user(text: str = "hello") -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str = " yes", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def upload(client: OpenAI, *objects: Any, name: str = "train.jsonl") -> str:
    content = lines(*(objects or tiny.learnable_examples(12)))
    return client.files.create(file=(name, content), purpose="fine-tune").id


def create(client: OpenAI, training_file: str | None = None, **more: Any) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=more.pop("model", "tiny-llama"), training_file=training_file or upload(client), **more
    )


def ours(**settings: Any) -> Any:
    return {"type": "compress_to_impress", "compress_to_impress": settings}


# --- the whole way, with the real mathematics --------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_models: Callable[..., Path]) -> Iterator[ServeProcess]:
    data = tmp_path_factory.mktemp("openai")
    live.install(tiny_models("gpt2"), data, "tiny-gpt2")
    running = ServeProcess(data)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def done(served: ServeProcess) -> FineTuningJob:
    """A job that has removed something."""
    openai_client = client(served.url)
    job = create(
        openai_client,
        upload(openai_client, *tiny.learnable_examples(80)),
        model="tiny-gpt2",
        suffix="answers",
        seed=0,
        method=ours(passes=2, objective="both"),
        metadata={"by": "test"},
    )
    assert job.status == "queued"
    assert (job.fine_tuned_model, job.result_files, job.finished_at) == (None, [], None)
    path = f"/fine_tuning/jobs/{job.id}/events?stream=true"
    with openai_client.get(path, cast_to=object, stream=True, stream_cls=openai.Stream[FineTuningJobEvent]) as stream:
        seen = list(stream)  # to the job's end
    assert [event.id for event in seen] == sorted(event.id for event in seen)
    assert {event.level for event in seen} == {"info"}
    ended = openai_client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded", ended.error
    assert seen[-1].message == served.http.get(f"/v1/jobs/{job.id}").json()["result"]["verdict"]
    return ended


def test_a_job_that_succeeded_names_its_model_and_its_files(served: ServeProcess, done: FineTuningJob) -> None:
    files = client(served.url).files
    assert done.fine_tuned_model == f"ft:tiny-gpt2:answers:{done.id}"
    assert done.finished_at is not None
    assert done.finished_at >= done.created_at
    assert (done.seed, done.metadata, done.hyperparameters.n_epochs) == (0, {"by": "test"}, 2)
    described = [files.retrieve(one) for one in done.result_files]
    assert [one.filename for one in described] == ["step_metrics.csv", "adapter.zip", "report.json"]
    for one in described:
        assert (one.purpose, one.status) == ("fine-tune-results", "processed")
        assert len(files.content(one.id).read()) == one.bytes
    listed = list(files.list(purpose="fine-tune-results", order="asc"))
    assert [one.id for one in listed if done.id in one.id] == done.result_files


def test_results_are_what_the_other_routes_give(served: ServeProcess, done: FineTuningJob, tmp_path: Path) -> None:
    files = client(served.url).files
    metrics, adapter, report = done.result_files
    assert files.content(report).read() == served.http.get(f"/v1/jobs/{done.id}/report").content
    path = tmp_path / "adapter.zip"
    with files.with_streaming_response.content(adapter) as response:
        response.stream_to_file(path)
    assert "adapter_model.safetensors" in " ".join(zipfile.ZipFile(path).namelist())
    assert path.read_bytes() == served.http.get(f"/v1/jobs/{done.id}/adapter.zip").content
    rows = list(csv.DictReader(io.StringIO(files.content(metrics).text)))
    passes = Report.model_validate_json(files.content(report).read()).passes
    assert [float(row["valid_loss"]) for row in rows] == [passes[0].base_loss, *(one.loss for one in passes)]
    assert [row["accepted"] for row in rows[1:]] == [str(one.accepted).lower() for one in passes]
    assert all(float(row["valid_accuracy"]) <= 1 for row in rows if row["accepted"] == "true")


def test_checkpoints_are_the_passes_the_last_one_first(served: ServeProcess, done: FineTuningJob) -> None:
    jobs = client(served.url).fine_tuning.jobs
    passes = served.http.get(f"/v1/jobs/{done.id}/report").json()["passes"]
    found = list(jobs.checkpoints.list(done.id, limit=1))  # the client turns the pages
    assert [one.step_number for one in found] == [one["number"] for one in reversed(passes)]
    assert [one.metrics.full_valid_loss for one in found] == [one["loss"] for one in reversed(passes)]
    assert found[0].fine_tuning_job_id == done.id
    assert found[-1].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-1"


def test_events_are_listed_newest_first_page_by_page(served: ServeProcess, done: FineTuningJob) -> None:
    openai_client = client(served.url)
    events = list(openai_client.fine_tuning.jobs.list_events(done.id, limit=7))
    known = [event["id"] for event in served.http.get(f"/v1/jobs/{done.id}/events").json()["data"]]
    assert len(known) > 7
    assert [event.id for event in events] == known[::-1]


def test_both_views_show_the_same_job(served: ServeProcess, done: FineTuningJob) -> None:
    openai_client = client(served.url)
    seen = served.http.get(f"/v1/jobs/{done.id}").json()
    assert (seen["model"], seen["metadata"]) == (done.model, done.metadata)
    body = {"model": "tiny-gpt2", "examples": tiny.learnable_examples(12), "seed": 7}
    body["validation"] = [{"prompt": "Another: answer", "completion": " no"}]
    theirs = served.http.post("/v1/jobs", json=body).json()["id"]
    job = openai_client.fine_tuning.jobs.retrieve(theirs)
    assert (job.model, job.seed) == ("tiny-gpt2", 7)
    assert theirs in [one.id for one in openai_client.fine_tuning.jobs.list()]
    # Its examples are files too, and make the same job.
    for file_id, split in ((job.training_file, "examples"), (job.validation_file, "validation")):
        assert file_id is not None
        content = openai_client.files.content(file_id).read()
        assert [json.loads(line) for line in content.splitlines()] == body[split]
        with pytest.raises(openai.ConflictError, match="DELETE /v1/jobs"):
            openai_client.files.delete(file_id)
    again = create(openai_client, job.training_file, model="tiny-gpt2")
    contents = [openai_client.files.content(one).read() for one in (f"file-{again.id}-examples", job.training_file)]
    assert contents[0] == contents[1]
    for one in (theirs, again.id):
        with suppress(openai.ConflictError):  # it has ended meanwhile
            openai_client.fine_tuning.jobs.cancel(one)


def test_the_example_script_leaves_the_results_beside_it(served: ServeProcess, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(lines(*chats(60)))
    script = live.REPOSITORY / "docs" / "examples" / "openai_client.py"
    env = {**os.environ, "C2I_URL": served.url}
    command = [sys.executable, str(script), "task.jsonl", "tiny-gpt2"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "queued"
    assert ran.stdout.splitlines()[-1].startswith("succeeded ft:tiny-gpt2::job_")
    assert {"step_metrics.csv", "adapter.zip", "report.json"} <= {path.name for path in tmp_path.iterdir()}


# --- files, lists, refusals, keys --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(shared_api: Api) -> OpenAI:
    return client(shared_api.url)


def test_a_file_is_kept_as_it_came_until_it_is_deleted(api: OpenAI) -> None:
    content = lines(*chats())
    file = api.files.create(
        file=("some/where/train.jsonl", content),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.filename, file.bytes, file.status) == ("train.jsonl", len(content), "processed")
    assert file.expires_at == file.created_at + 3600
    assert api.files.retrieve(file.id) == file
    assert api.files.content(file.id).read() == content
    assert api.files.wait_for_processing(file.id) == file
    assert api.files.delete(file.id).deleted
    for ask in (api.files.retrieve, api.files.content, api.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)


def test_files_and_jobs_are_listed_page_by_page_by_both_clients(api: OpenAI, shared_api: Api) -> None:
    files = [upload(api, name=f"{k}.jsonl") for k in range(5)]
    jobs = [create(api, files[0], metadata={"page": "x y", "k": str(k)}).id for k in range(5)]
    assert [file.id for file in api.files.list(limit=2) if file.id in files] == sorted(files, reverse=True)
    assert [file.id for file in api.files.list(limit=2, order="asc") if file.id in files] == sorted(files)
    assert [job.id for job in api.fine_tuning.jobs.list(limit=2) if job.id in jobs] == sorted(jobs, reverse=True)
    found = list(api.fine_tuning.jobs.list(limit=2, metadata={"page": "x y"}))
    assert sorted(job.id for job in found) == sorted(jobs)
    assert [job.id for job in api.fine_tuning.jobs.list(metadata={"page": "x y", "k": "3"})] == [jobs[3]]
    assert list(api.fine_tuning.jobs.list(metadata={"page": "z"})) == []

    async def ask() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{shared_api.url}/v1", api_key="any") as asynchronous:
            pages = asynchronous.fine_tuning.jobs.list(limit=2, metadata={"page": "x y"})
            return [job.id async for job in pages], [file.id async for file in asynchronous.files.list(limit=2)]

    listed, files_listed = asyncio.run(ask())
    assert listed == [job.id for job in found]
    assert set(files) <= set(files_listed)


def test_a_file_of_messages_is_a_chat(api: OpenAI, shared_api: Api) -> None:
    job = create(api, upload(api, *chats()), validation_file=upload(api, *chats(15)[12:]))
    spec = shared_api.service.store.get_input(job.id)
    assert spec.prompt_format == "chat"
    assert spec.examples[1].prompt == "Item 1: answer"
    assert spec.examples[1].completion == " no"
    assert spec.validation is not None
    assert len(spec.validation) == 3
    assert job.validation_file is not None
    assert api.files.content(f"file-{job.id}-examples").read() == lines(*chats())


def test_a_system_message_and_earlier_turns_stand_before_the_prompt(api: OpenAI, shared_api: Api) -> None:
    system = {"role": "system", "content": "Be brief."}
    lately = [{"role": "developer", "content": "Be brief."}, user("Hi"), assistant("Yes?")]
    content = [{"messages": [*(lately if k else [system]), *one["messages"]]} for k, one in enumerate(chats())]
    job = create(api, upload(api, *content))
    spec = shared_api.service.store.get_input(job.id)
    turns = [[turn.role for turn in example.turns or ()] for example in spec.examples]
    assert turns == [["system"], *[["system", "user", "assistant"]] * 11]
    assert spec.examples[0].prompt == "Item 0: answer"
    assert (spec.examples[1].turns or [])[0].content == "Be brief."
    assert spec.shared_turns == []
    again = create(api, f"file-{job.id}-examples")  # a job's own file makes the same job
    assert shared_api.service.store.get_input(again.id) == spec
    one_system = create(api, upload(api, *({"messages": [system, *one["messages"]]} for one in chats())))
    assert [turn.role for turn in shared_api.service.store.get_input(one_system.id).shared_turns] == ["system"]


def test_settings_go_through_and_are_shown(api: OpenAI, shared_api: Api) -> None:
    settings = {"strategy": "laser", "strategy_options": {"sample": 3}, "max_drift": 0.5, "objective": "completion"}
    job = create(api, method=ours(**settings), seed=3)
    spec = shared_api.service.store.get_input(job.id)
    assert (spec.strategy, spec.max_drift, spec.objective, spec.seed) == ("laser", 0.5, "completion", 3)
    shown: Any = job.to_dict()["method"]
    assert shown["type"] == "compress_to_impress"
    assert shown["compress_to_impress"]["strategy_options"]["sample"] == 3
    assert shown["compress_to_impress"]["objective"] == "completion"


def test_a_model_is_compressed_by_the_same_settings(api: OpenAI, shared_api: Api) -> None:
    job = create(api, method=ours(goal="compress", target="bytes=0.5", strategy="layers", passes=2))
    spec = shared_api.service.store.get_input(job.id)
    assert (spec.goal, str(spec.target), spec.strategy, spec.passes) == ("compress", "bytes=0.5", "layers", 2)


@pytest.mark.parametrize(
    ("asked", "passes", "told"),
    [
        ({"hyperparameters": {"n_epochs": "auto"}}, 1, []),
        ({"method": {"type": "supervised"}}, 1, []),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}}, 3, ["n_epochs"]),
        (
            {"hyperparameters": {"n_epochs": 50, "batch_size": 4, "learning_rate_multiplier": 0.5}},
            8,
            ["n_epochs", "batch_size", "learning_rate_multiplier"],
        ),
    ],
)
def test_a_script_for_supervised_fine_tuning_is_told_what_became_of_its_settings(
    api: OpenAI, asked: dict[str, Any], passes: int, told: list[str]
) -> None:
    job = create(api, **asked)
    assert job.hyperparameters.n_epochs == passes
    events = list(api.fine_tuning.jobs.list_events(job.id))
    assert [event.message.split()[0] for event in reversed(events) if event.level == "warn"] == told


GOOD = tiny.learnable_examples(12)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b'\n{"prompt": \n', "t.jsonl:2: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (lines(*GOOD, [1]), "t.jsonl:13"),
        (lines(*GOOD, {"prompt": "a"}), "t.jsonl:13: completion"),
        (lines(*GOOD, {"messages": [user(), assistant()]}), "t.jsonl:13: either all"),
        (lines({"messages": []}), "t.jsonl:1: messages"),
        (lines({"messages": [user(), {"role": "robot", "content": "x"}]}), "t.jsonl:1: messages[1].role"),
        (lines({"messages": [user()]}), "t.jsonl:1: messages[0].role"),
        (lines({"messages": [assistant()]}), "t.jsonl:1: messages[0]"),
        (lines({"messages": [user(), assistant(weight=0)]}), "t.jsonl:1: messages[1].weight"),
        (lines({"messages": [user(), assistant(tool_calls=[])]}), "t.jsonl:1: messages[1].tool_calls"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(api: OpenAI, content: bytes, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        api.files.create(file=("t.jsonl", content), purpose="fine-tune")
    assert refusal.value.param == "file"
    assert told in refusal.value.message


def test_a_form_that_is_wrong_is_refused_by_its_field(api: OpenAI, shared_api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        api.files.create(file=("t.jsonl", lines(*GOOD)), purpose="batch")
    assert refusal.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refusal:
        api.files.create(
            file=("t.jsonl", lines(*GOOD)),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 60},
        )
    assert refusal.value.param == "expires_after.seconds"
    for body, status, param in (
        ({"data": {"purpose": "fine-tune", "file": "text"}, "files": {"other": b""}}, 400, "file"),
        ({"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data"}}, 400, None),
        ({"content": b"nonsense", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, None),
        ({"json": {}}, 415, None),
    ):
        response = shared_api.http.post("/v1/files", **body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_a_file_that_is_too_large_is_refused(api: OpenAI) -> None:
    content = lines(*({"prompt": "x" * 100_000, "completion": "y"} for _ in range(170)))
    with pytest.raises(openai.APIStatusError) as refusal:
        api.files.create(file=("t.jsonl", content), purpose="fine-tune")
    assert (refusal.value.status_code, refusal.value.code) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "../x"}, "model"),
        ({"training_file": "file-nonsense"}, "training_file"),
        ({"validation_file": "file-00000000000000000000"}, "validation_file"),
        ({"seed": -1}, "seed"),
        ({"suffix": "a:b"}, "suffix"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method"),
        ({"method": {"type": "supervised", "compress_to_impress": {}}}, "method"),
        ({"method": ours(passes=9)}, "method.compress_to_impress.passes"),
        ({"method": ours(strategy="laser", strategy_options={"order": 1})}, "method.compress_to_impress.strategy_opt"),
        ({"method": ours(goal="compress", target="bytes=0.5")}, "method.compress_to_impress.strategy"),
        ({"method": ours(epochs=9)}, "method.compress_to_impress.epochs"),
        ({"method": ours(), "hyperparameters": {"n_epochs": 2}}, None),
        ({"extra_body": {"examples": []}}, "examples"),
    ],
)
def test_a_job_that_is_wrong_is_refused_by_its_field(api: OpenAI, changes: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        create(api, **changes)
    assert (refusal.value.param or "")[: len(param or "")] == (param or "")
    assert (refusal.value.type, refusal.value.code) == ("invalid_request_error", "invalid_request")
    assert (refusal.value.body or {})["message"]  # type: ignore[index]


def test_what_is_wrong_with_an_example_is_told_by_its_line(api: OpenAI) -> None:
    again = {"prompt": GOOD[0]["prompt"], "completion": " no", "choices": GOOD[0]["choices"]}
    long = {"prompt": "x " * 400, "completion": "y"}
    for file, more, param, told in (
        (upload(api, *GOOD, again, name="a.jsonl"), {}, "training_file", "a.jsonl:13: completion"),
        (upload(api, *GOOD[:7]), {}, "training_file", "at least 8"),
        (
            upload(api, *chats(), {"messages": [user(), assistant(""), user(), assistant(" ")]}, name="c.jsonl"),
            {},
            "training_file",
            "c.jsonl:13: messages[3].content: empty",
        ),
        (upload(api, *GOOD, long, name="b.jsonl"), {}, "training_file", "b.jsonl:13: prompt"),
        (
            upload(api),
            {"validation_file": upload(api, GOOD[3], name="v.jsonl")},
            "validation_file",
            "v.jsonl:1: prompt",
        ),
        (upload(api), {"validation_file": upload(api, *chats())}, "validation_file", "messages"),
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            create(api, file, **more)
        assert refusal.value.param == param
        assert told in refusal.value.message
    with pytest.raises(openai.BadRequestError) as refusal:
        create(api, upload(api, *chats()), method=ours(prompt_format="text"))
    assert refusal.value.param == "method.compress_to_impress.prompt_format"


def test_other_errors_are_the_clients_own_too(api: OpenAI, shared_api: Api) -> None:
    with pytest.raises(openai.NotFoundError) as absent:
        create(api, model="no-such-model")
    assert (absent.value.code, absent.value.param) == ("model_not_found", "model")
    assert [model.id for model in api.models.list()] == ["tiny-llama"]
    with pytest.raises(openai.NotFoundError):
        api.fine_tuning.jobs.retrieve("ftjob-abc")
    job = create(api)
    for ask in (api.fine_tuning.jobs.pause, api.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="cancel it"):
            ask(job.id)
    key = {"Idempotency-Key": "one"}
    body: dict[str, Any] = {"model": "tiny-llama", "training_file": job.training_file, "extra_headers": key}
    assert api.fine_tuning.jobs.create(**body).id == api.fine_tuning.jobs.create(**body).id
    with pytest.raises(openai.ConflictError) as conflict:
        api.fine_tuning.jobs.create(**body, seed=5)
    assert conflict.value.response.headers["x-should-retry"] == "false"


def test_a_job_is_cancelled_and_one_that_failed_says_why(api_of_one: Api, worker: WorkerProcess, redis: Any) -> None:
    api = client(api_of_one.url)
    job = create(api, metadata={"do": "block"})
    wait_until(lambda: api.fine_tuning.jobs.retrieve(job.id).status == "running" or None, 20, "it runs")
    wait_until(lambda: api.fine_tuning.jobs.retrieve(job.id).estimated_finish, 20, "its end is estimated")
    assert api.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    api_of_one.await_status(job.id, "cancelled")
    assert api.fine_tuning.jobs.retrieve(job.id).result_files == []
    with pytest.raises(openai.NotFoundError):
        api.files.content(f"file-{job.id}-adapter")
    assert list(api.fine_tuning.jobs.checkpoints.list(job.id)) == []
    failed = create(api, metadata={"do": "refuse"})
    api_of_one.await_status(failed.id, "failed")
    error = api.fine_tuning.jobs.retrieve(failed.id).error
    assert error is not None
    assert (error.code, error.param) == ("unusable_model", "model")
    assert api.fine_tuning.jobs.list_events(failed.id).data[0].level == "error"
    with pytest.raises(openai.ConflictError):
        api.fine_tuning.jobs.cancel(failed.id)


@pytest.fixture
def api_of_one(data: Path, redis: Any) -> Iterator[Api]:
    running = Api(data, redis.url)
    yield running
    running.stop()


def test_files_and_jobs_are_their_keys_own(data: Path, redis: Any) -> None:
    locked = Api(data, redis.url, require_keys=True, max_requests_per_second=1000)
    try:
        keys = locked.service.keys
        (mine, _), (theirs, _) = (keys.create(name, EVERYTHING) for name in ("mine", "theirs"))
        reads, _ = keys.create("reads", frozenset({Scope.READ}))
        admin, _ = keys.create("admin", frozenset({Scope.ADMIN}))
        with pytest.raises(openai.AuthenticationError):
            upload(client(locked.url, "sk-wrong"))
        with pytest.raises(openai.PermissionDeniedError):
            upload(client(locked.url, reads))
        file = upload(client(locked.url, mine))
        job = create(client(locked.url, mine), file)
        for stranger in (theirs, reads):
            other = client(locked.url, stranger)
            assert list(other.files.list()) == []
            assert list(other.fine_tuning.jobs.list()) == []
            for ask in (other.files.retrieve, other.files.content):
                with pytest.raises(openai.NotFoundError):
                    ask(file)
            with pytest.raises(openai.NotFoundError):
                other.files.retrieve(f"file-{job.id}-examples")
            with pytest.raises(openai.NotFoundError):
                other.fine_tuning.jobs.retrieve(job.id)
        with pytest.raises(openai.BadRequestError) as refusal:
            create(client(locked.url, theirs), file)
        assert refusal.value.param == "training_file"
        everything = client(locked.url, admin)
        assert [one.id for one in everything.files.list()] == [file]
        assert everything.files.content(file).read() == lines(*tiny.learnable_examples(12))
    finally:
        locked.stop()


def test_a_key_that_asks_too_often_is_told_so_by_the_clients_own_error(data: Path, redis: Any) -> None:
    limited = Api(data, redis.url, require_keys=True, max_requests_per_second=1)
    try:
        key, _ = limited.service.keys.create("often", EVERYTHING)
        with pytest.raises(openai.RateLimitError) as refusal:
            for _ in range(20):
                client(limited.url, key).files.list()
        assert refusal.value.type == "rate_limit_error"
        assert refusal.value.response.headers["retry-after"] == "1"
    finally:
        limited.stop()

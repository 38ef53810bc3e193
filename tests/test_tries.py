"""Tries: what both models answer is what they are, nobody else sees it, and nothing of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from service import models
from service.artifacts import ArtifactStore
from service.connections import connect
from service.embedded import EmbeddedRedis
from service.errors import Conflict, JobNotFound, NotFound, TooManyRequests
from service.jobs import Job, JobSpec, JobStatus
from service.queue import JobQueue
from service.reaper import Reaper
from service.records import new_job_id
from service.settings import Settings
from service.tries import queue as tries
from service.tries.contract import TrySpec
from service.tries.queue import TryQueue
from tests import live, plain, stand_in, tiny
from tests.chaos.keys import find_stray_keys
from tests.live import Api, WorkerProcess, wait_until
from workers.checkpoints import write_adapter, write_model
from workers.ranking import Plan

PROMPT = "Is this sentence good or bad? Answer:"
TASKS = [
    ("llama", "text"),
    ("llama", "chat"),
    ("gpt2", "text"),
    ("gemma3", "text"),
    ("roberta", "text"),
    ("bert", "text"),
]

SYSTEM = {"role": "system", "content": "Be brief."}
TinyModels = Callable[..., Path]


@dataclass
class World:
    """An API, a process that answers, and jobs that have published."""

    api: Api
    worker: WorkerProcess
    log: Path
    jobs: dict[tuple[str, str], str]

    def ask(self, job_id: str, prompt: str = PROMPT, **fields: Any) -> httpx.Response:
        """Create a try."""
        return self.api.http.post(f"/v1/jobs/{job_id}/tries", json={"prompt": prompt, **fields})

    def get(self, location: str, wait: float = 0) -> httpx.Response:
        """Look at one."""
        return self.api.http.get(location, params={"wait": wait})

    def ended(self, asked: httpx.Response) -> dict[str, Any]:
        """A try when it has ended, by long polls alone."""
        assert asked.status_code == 202, asked.text
        while (found := self.get(asked.headers["location"], 20).json())["status"] not in ("succeeded", "failed"):
            pass
        return dict(found)


def publish(api: Api, folder: Path, **changes: Any) -> str:
    """A job that has removed components of a real model, and published what a real one does."""
    spec = JobSpec.parse(live.spec(model=folder.name, **changes))
    service, job_id = api.service, new_job_id()
    base = plain.loaded(folder)
    targets, spectra = plain.targets_of(folder)
    plan = Plan({target.name: tuple(range(12)) for target in targets[::2]})
    report = stand_in.make_report(spec)
    revision = models.resolve(service.settings.models, folder.name).revision
    report = report.model_copy(update={"model": report.model.model_copy(update={"revision": revision})})
    out = service.settings.data / job_id
    write_adapter(out / "adapter", folder.name, targets, spectra, plan, masked=base.masked)
    write_model(out / "model", base, targets, spectra, plan)
    (out / "report.json").write_text(report.model_dump_json())
    # All at once, and long before the lease lapses.
    service.store.put_input(job_id, spec)
    service.queue.create(job_id, spec)
    attempt = service.queue.start(job_id)
    service.store.publish(job_id, attempt, out)
    service.queue.succeed(job_id, attempt, report.brief())
    return job_id


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_models: TinyModels) -> Iterator[World]:
    data = tmp_path_factory.mktemp("tries")
    server = live.redis(data)
    log = data / "log"
    worker = WorkerProcess(data, server.url, log=log, module="tests.stand_in_tries")
    api = Api(data, server.url)
    jobs = {}
    for architecture, prompt_format in TASKS:
        folder = data / "models" / architecture
        if not folder.exists():
            live.install(tiny_models(architecture), data, architecture)
        examples = [
            {"prompt": f"{'<mask>' if architecture == 'roberta' else '[MASK]'} item {i}", "completion": " yes"}
            for i in range(8)
        ]
        if prompt_format == "chat":
            examples = [one | {"turns": [SYSTEM]} for one in tiny.learnable_examples(12)]
        changes = {"examples": examples} if architecture in tiny.MASKED or prompt_format == "chat" else {}
        jobs[architecture, prompt_format] = publish(api, folder, prompt_format=prompt_format, **changes)
    yield World(api, worker, log, jobs)
    api.stop()
    worker.kill()
    server.stop()


def reference(folder: Path, base: Path, prompt: str, prompt_format: str, max_tokens: int) -> str:
    """What transformers' own greedy decoding says."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    if tokenizer.mask_token:
        inputs = tokenizer(prompt, return_tensors="pt")
        logits = AutoModelForMaskedLM.from_pretrained(folder)(**inputs).logits[0]
        return str(tokenizer.decode(logits[inputs["input_ids"][0] == tokenizer.mask_token_id].argmax(-1)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    turns = [SYSTEM, {"role": "user", "content": prompt}]  # as all of the job's examples begin
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text if prompt_format == "chat" else prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


@pytest.mark.parametrize(("architecture", "prompt_format"), TASKS)
def test_both_answers_are_those_of_transformers(
    world: World, architecture: str, prompt_format: str, tmp_path: Path
) -> None:
    job_id = world.jobs[architecture, prompt_format]
    prompt = PROMPT
    if architecture in tiny.MASKED:
        prompt += " <mask>." if architecture == "roberta" else " [MASK]."
    ended = world.ended(world.ask(job_id, prompt, max_tokens=24))
    assert ended["status"] == "succeeded", ended
    base = world.api.settings.models / architecture
    for file in world.api.http.get(f"/v1/jobs/{job_id}/files").json()["data"]:
        path = tmp_path / file["path"]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(world.api.http.get(file["url"]).content)
    with torch.no_grad():
        for name, folder in (("base", base), ("adapted", tmp_path / "model")):
            assert ended[name] == {"text": reference(folder, base, prompt, prompt_format, 24)}
    assert ended["base"] != ended["adapted"]


def test_an_answer_ends_at_the_models_end_and_is_greedy_whatever_its_configuration_says(world: World) -> None:
    job_id = world.jobs["gpt2", "text"]
    folder = world.api.settings.models / "gpt2"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = plain.greedy(plain.loaded(folder).model, tokenizer(PROMPT)["input_ids"], 12)
    end = tokens.index(tokens[6])
    config = folder / "generation_config.json"
    before = config.read_text()
    config.write_text(json.dumps({"eos_token_id": tokens[6], "do_sample": True, "top_k": 0, "repetition_penalty": 9.0}))
    try:
        ended = world.ended(world.ask(job_id, max_tokens=12))
    finally:
        config.write_text(before)
    text = tokenizer.decode([*tokenizer(PROMPT)["input_ids"], *tokens[: end + 1]], skip_special_tokens=True)
    assert ended["base"]["text"] == text.removeprefix(PROMPT)


def test_the_bases_answer_is_there_first_and_with_the_job_all_is_gone(world: World) -> None:
    job_id = publish(world.api, world.api.settings.models / "llama")
    asked = world.ask(job_id, "block")
    assert asked.headers["location"] == f"/v1/jobs/{job_id}/tries/{asked.json()['id']}"
    while not (first := world.get(asked.headers["location"], 30).json())["base"]:
        pass
    assert (first["status"], first["base"], first["adapted"]) == ("running", {"text": " of the base"}, None)
    queued = world.ask(job_id, "block again")  # behind it
    assert queued.json()["status"] == "queued"
    processes = psutil.Process(world.worker.pid).children()
    assert world.api.http.delete(f"/v1/jobs/{job_id}").status_code == 204
    for one in (asked, queued):
        assert world.get(one.headers["location"]).status_code == 404
    wait_until(lambda: not any(process.is_running() for process in processes), 5, "its process is killed")
    # The next one's turn comes: none of the two is left in the queue.
    assert world.ended(world.ask(world.jobs["llama", "text"]))["status"] == "succeeded"
    assert find_stray_keys(world.api.service.queue.redis) == []


def test_a_killed_process_answers_again_and_one_that_always_dies_fails_in_words(world: World) -> None:
    job_id = world.jobs["llama", "text"]
    once, always = (world.ended(world.ask(job_id, prompt)) for prompt in ("once upon a time", "die"))
    assert once["status"] == "succeeded"
    assert (always["status"], always["error"]["code"]) == ("failed", "worker_died")
    assert "2 times" in always["error"]["message"]
    assert "SIGKILL" in always["error"]["message"]


def test_nothing_of_a_try_stands_in_logs_or_stays_in_redis(world: World) -> None:
    secret = "secret words that nobody else may read"
    ended = world.ended(world.ask(world.jobs["llama", "text"], secret))
    assert ended["status"] == "succeeded"
    log = world.log.read_text()
    assert ended["id"] in log
    assert secret not in log
    assert ended["base"]["text"] not in log
    assert secret.encode() not in world.api.service.queue.redis.dump(f"c2i:try:{ended['id']}")
    assert secret.encode() not in b"".join(world.api.service.queue.redis.hgetall(f"c2i:try:{ended['id']}").values())


def test_a_base_that_is_another_by_now_is_refused(world: World) -> None:
    job_id = world.jobs["gemma3", "text"]
    revision = world.api.settings.models / "gemma3" / ".revision"
    revision.write_text("another")
    try:
        ended = world.ended(world.ask(job_id))
    finally:
        revision.unlink()
    assert (ended["status"], ended["error"]["code"], ended["error"]["param"]) == ("failed", "unusable_model", "model")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": " \n"}, 422, "prompt"),
        ({"prompt": 3}, 422, "prompt"),
        ({"prompt": "x" * 100_001}, 422, "prompt"),
        ({"prompt": "Answer: " * 100}, 422, "prompt"),
        ({"prompt": PROMPT, "max_tokens": 0}, 422, "max_tokens"),
        ({"prompt": PROMPT, "max_tokens": 257}, 422, "max_tokens"),
        ({"prompt": PROMPT, "max_tokens": 256}, 422, "max_tokens"),  # the model's whole context
        ({"prompt": PROMPT, "max_tokens": True}, 422, "max_tokens"),
        ({"prompt": PROMPT, "temperature": 1}, 422, "temperature"),
        ({"max_tokens": 3}, 422, "prompt"),
        ({"prompt": "x" * 1_000_000}, 413, None),
        ([], 422, None),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(world: World, body: Any, status: int, param: str | None) -> None:
    refused = world.api.http.post(f"/v1/jobs/{world.jobs['llama', 'text']}/tries", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)


def test_what_the_api_cannot_count_the_worker_refuses(world: World) -> None:
    """A chat's template is a part of the prompt."""
    prompt = "yes" + " yes" * (tiny.CONTEXT - 3)
    assert len(tiny.tokenizer()(prompt)["input_ids"]) in (tiny.CONTEXT - 1, tiny.CONTEXT - 2)
    asked = [world.ask(world.jobs["llama", format], prompt, max_tokens=1) for format in ("text", "chat")]
    text, chat = (world.ended(one) for one in asked)
    assert text["status"] == "succeeded"
    assert (chat["status"], chat["error"]["code"], chat["error"]["param"]) == ("failed", "invalid_request", "prompt")


def test_masks_are_counted_and_only_a_job_that_succeeded_is_tried(world: World) -> None:
    refused = world.ask(world.jobs["bert", "text"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "prompt")
    queued = world.api.submit(model="llama")
    assert world.ask(queued).status_code == 409
    world.api.http.post(f"/v1/jobs/{queued}/cancel")
    assert world.ask(queued).status_code == 409
    assert world.ask(new_job_id()).json()["error"]["code"] == "job_not_found"
    url = f"/v1/jobs/{world.jobs['llama', 'text']}/tries"
    assert world.api.http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_a_try_belongs_to_its_job(world: World) -> None:
    asked = world.ask(world.jobs["llama", "text"])
    other = asked.headers["location"].replace(world.jobs["llama", "text"], world.jobs["llama", "chat"])
    assert world.get(other).json()["error"]["code"] == "not_found"
    assert world.ended(asked)["status"] == "succeeded"


# --- without a worker ---------------------------------------------------------------------------------------------


@pytest.fixture
def queue(redis: EmbeddedRedis) -> Iterator[JobQueue]:
    made = JobQueue(connect(redis.url), timedelta(days=1))
    yield made
    made.redis.close()


def succeeded(queue: JobQueue) -> Job:
    """A job that has nothing but its record."""
    spec = JobSpec.parse(live.spec())
    job_id = new_job_id()
    queue.create(job_id, spec)
    queue.succeed(job_id, queue.start(job_id), stand_in.make_report(spec).brief())
    return queue.get(job_id)


def test_tries_are_on_where_no_keys_are_in_force_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Settings().tries_in_force
    assert not Settings(host="0.0.0.0").tries_in_force
    assert not Settings(require_keys=True).tries_in_force
    monkeypatch.setenv("C2I_TRIES", "on")
    assert Settings(host="0.0.0.0").tries_in_force
    monkeypatch.setenv("C2I_TRIES", "off")
    assert not Settings().tries_in_force


def test_where_tries_are_off_there_are_none(data: Path, redis: EmbeddedRedis) -> None:
    api = Api(data, redis.url, tries=False)
    try:
        for method in ("POST", "GET"):
            path = "" if method == "POST" else "/try_00000000000000000000"
            refused = api.http.request(method, f"/v1/jobs/{new_job_id()}/tries{path}", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "not_found")
            assert "C2I_TRIES" in refused.json()["error"]["message"]
        assert api.http.get("/v1/service").json()["tries"] is False
    finally:
        api.stop()


def test_only_so_many_wait_of_a_caller_and_in_all(queue: JobQueue) -> None:
    asked, job = TryQueue(queue.redis), succeeded(queue)
    spec = TrySpec(prompt=PROMPT)
    for owner in range(tries.MOST // tries.MOST_OF_A_CALLER):
        for _ in range(tries.MOST_OF_A_CALLER):
            last = asked.create(job, spec, f"owner{owner}")
        if owner < tries.MOST // tries.MOST_OF_A_CALLER - 1:
            with pytest.raises(TooManyRequests, match=f"{tries.MOST_OF_A_CALLER} of your"):
                asked.create(job, spec, f"owner{owner}")
    with pytest.raises(TooManyRequests, match=f"{tries.MOST} tries wait"):
        asked.create(job, spec, "another")
    asked.fail(last.id, asked.start(last.id), NotFound("it ends"))
    asked.create(job, spec, "another")


def test_a_lost_try_is_given_back_and_one_that_lapsed_leaves_nothing(
    queue: JobQueue, redis: EmbeddedRedis, tmp_path: Path
) -> None:
    asked, job = TryQueue(queue.redis), succeeded(queue)
    reaper = Reaper(queue, ArtifactStore(tmp_path / "store"), timedelta(days=1))
    running, lapsed = (asked.create(job, TrySpec(prompt=PROMPT)).id for _ in range(2))
    attempt = asked.start(running)
    queue.redis.lpop(asked.deliveries.key)  # on its way to a worker that was killed
    queue.redis.delete(f"c2i:try:{running}:lease:{attempt}")
    for _ in range(2):
        reaper.look()
    assert asked.get(running, job.id).status is asked.get(lapsed, job.id).status is JobStatus.QUEUED
    # Sorted both: IDs of one millisecond have no order.
    both = sorted([f"{running}-2".encode(), f"{lapsed}-2".encode()])
    assert sorted(queue.redis.lrange(asked.deliveries.key, 0, -1)) == both
    with pytest.raises(Conflict):
        asked.succeed(running, attempt, "an answer of the attempt that was lost")
    for key in queue.redis.scan_iter():
        assert b"try" not in key or 0 < queue.redis.ttl(key) <= tries.TTL_SECONDS
    queue.redis.delete(f"c2i:try:{lapsed}")
    reaper.look()
    assert queue.redis.lrange(asked.deliveries.key, 0, -1) == [f"{running}-2".encode()]
    assert queue.redis.smembers("c2i:tries") == {f"|{running}".encode()}
    assert find_stray_keys(queue.redis) == []
    queue.delete(job.id)
    queue.files_deleted(job.id)
    with pytest.raises(NotFound):
        asked.start(running)
    assert not list(queue.redis.scan_iter("c2i:tr*"))
    assert find_stray_keys(queue.redis) == []


def test_no_try_is_made_of_a_job_that_is_gone(queue: JobQueue) -> None:
    job = succeeded(queue)
    queue.delete(job.id)
    with pytest.raises(JobNotFound):
        TryQueue(queue.redis).create(job, TrySpec(prompt=PROMPT))
    assert not list(queue.redis.scan_iter("c2i:tr*"))

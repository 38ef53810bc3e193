"""`dry_run`: what a job would take, told before any of it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import estimates, models
from service.decomposed import is_decomposed, note
from service.estimates import Loads
from service.jobs import JobSpec
from service.lengths import count
from tests import tiny
from tests.live import Api, install, redis, spec
from workers import rounds
from workers.examples import Encoded
from workers.splits import divide


@pytest.fixture
def api(tiny_models: Callable[..., Path], tmp_path: Path) -> Iterator[Api]:
    install(tiny_models("llama"), tmp_path)
    server = redis(tmp_path)
    started = Api(tmp_path, server.url)
    yield started
    started.stop()
    server.stop()


def test_a_dry_run_tells_what_the_job_would_take_and_queues_nothing(api: Api) -> None:
    response = api.http.post("/v1/jobs", params={"dry_run": True}, json=spec())
    assert response.status_code == 200, response.text
    told = response.json()
    assert told["seconds"] == pytest.approx(sum(told["stages"].values()), abs=0.5)
    assert told["memory_bytes"] > 0 and told["disk_bytes"] > 0 and told["tokens"] > 0
    assert not told["measured_speed"]
    assert api.http.get("/v1/jobs").json()["data"] == []
    assert not list((api.settings.artifacts / "jobs").iterdir())


def test_the_passes_of_a_compression_are_counted_as_they_are_made() -> None:
    assert estimates.LAST_PASSES == rounds.LAST_PASSES


@pytest.mark.parametrize(
    ("changes", "param"), [({"model": "absent"}, "model"), ({"passes": 9}, "passes"), ({"examples": []}, "examples")]
)
def test_a_dry_run_checks_as_a_submission_does(changes: dict[str, object], param: str, api: Api) -> None:
    dry, real = (api.http.post("/v1/jobs", params={"dry_run": dry}, json=spec(**changes)) for dry in (True, False))
    assert dry.status_code == real.status_code >= 400
    assert dry.json() == real.json()
    assert dry.json()["error"]["param"] == param


def test_more_of_anything_takes_longer(api: Api) -> None:
    def seconds(**changes: object) -> float:
        response = api.http.post("/v1/jobs", params={"dry_run": True}, json=spec(**changes))
        return float(response.json()["stages"]["searching"])

    # A tiny model's arithmetic is lost beside a second: a hundred thousand tokens are not.
    examples = [
        {**example, "prompt": f"{k} {40 * 'a '}{example['prompt']}"}
        for k, example in enumerate(100 * tiny.learnable_examples(12))
    ]
    assert seconds(examples=examples) > seconds()
    assert seconds(examples=examples, passes=8) > seconds(examples=examples)
    assert seconds(examples=examples, strategy="laser") >= 2 * seconds(examples=examples)


@pytest.mark.parametrize("n", [12, 59, 60, 200])
@pytest.mark.parametrize("validation", [None, 20, 60])
@pytest.mark.parametrize("test", [None, 30])
def test_the_splits_are_those_that_the_worker_makes(
    n: int, validation: int | None, test: int | None, tiny_models: Callable[..., Path]
) -> None:
    folder = tiny_models("llama")
    model = models.resolve(folder.parent, folder.name)
    rows = [{"prompt": f"{k} is", "completion": " yes"} for k in range(n + 60 + 30)]
    body = {"model": "tiny-llama", "examples": rows[:n]}
    if validation:
        body["validation"] = rows[n : n + validation]
    if test:
        body["test"] = rows[n + 60 : n + 60 + test]
    job = JobSpec.parse(body)
    loads = Loads.of(job, model)
    start = 0
    encoded: list[list[Encoded] | None] = []
    for part in (job.examples, job.validation, job.test):
        encoded.append([Encoded((start + k,), ((1,),), 0, ("x",)) for k in range(len(part))] if part else None)
        start += 1000
    sizes = divide(encoded[0] or [], encoded[1], encoded[2], seed=0).sizes
    assert loads.gradient.rows == pytest.approx(sizes.gradient, abs=1)
    assert loads.selection.rows == pytest.approx(sizes.selection, abs=1)
    assert loads.test.rows == pytest.approx(0 if sizes.cross_validated else sizes.test, abs=1)


def test_tokens_are_those_of_prompts_and_all_answers(smollm2: Path) -> None:
    model = models.resolve(smollm2.parent, smollm2.name)
    job = JobSpec.parse(
        {
            "model": smollm2.name,
            "examples": 8 * [{"prompt": "one two three", "completion": " yes", "choices": [" yes", " no"]}],
        }
    )
    tokens = count(model, job.examples)
    assert (tokens.rows, tokens.total, tokens.answers) == (8, 8 * 5, 8 * 2)


def test_a_model_is_decomposed_only_while_all_its_files_are_in_the_cache(tmp_path: Path) -> None:
    assert not is_decomposed(tmp_path, "a")
    spectra = tmp_path / "spectra"
    spectra.mkdir()
    for name in ("1", "2"):
        (spectra / name).touch()
    note(tmp_path, "a", ["1", "2"])
    assert is_decomposed(tmp_path, "a") and not is_decomposed(tmp_path, "b")
    (spectra / "2").unlink()
    assert not is_decomposed(tmp_path, "a")

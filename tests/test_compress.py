"""`goal: compress`: rounds down to a size, each of which gives a model that stock transformers loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from service import models
from service.errors import InvalidInput
from service.jobs import JobSpec, Stage
from service.reports import Report
from tests import tiny
from tests.live import ServeProcess, install, spec, wait_until
from workers.adaptation import adapt, encode_for, layout_for
from workers.evaluation import Outcome, evaluate
from workers.loading import Checkpoint, load
from workers.rounds import check_compressed
from workers.splits import Splits, divide
from workers.targets import decoder_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"num_hidden_layers": 6, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}


class Compressed:
    """One compression of a tiny model, and what it left."""

    def __init__(self, folder: Path, out: Path, **fields: Any) -> None:
        out.mkdir(parents=True)
        self.folder, self.out = folder, out
        self.told: list[tuple[Stage, float, str]] = []
        body = {"model": folder.name, "examples": tiny.learnable_examples(96), "goal": "compress", "passes": 3}
        self.spec = JobSpec.parse(body | fields)
        model = models.resolve(folder.parent, folder.name)
        self.report: Report = adapt(
            self.spec,
            model,
            out,
            cache=out.parent / "cache",
            on_progress=lambda stage, percent, eta, message: self.told.append((stage, percent, message)),
        )

    def numbers(self, path: str) -> int:
        """Of a written model, as stock transformers loads it."""
        return _numbers(self.out / path)


def _numbers(folder: Path) -> int:
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, which are most of it."""
    return tiny.build("llama", tmp_path_factory.mktemp("compress") / "six", shape=SHAPE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many layers that they take most of a token's time."""
    shape = SHAPE | {"num_hidden_layers": 24}
    return tiny.build("llama", tmp_path_factory.mktemp("compress") / "deep", shape=shape)


@pytest.fixture(scope="module")
def layers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    out = tmp_path_factory.mktemp("compressed") / "layers"
    return Compressed(model, out, strategy="layers", target={"parameters": 0.5})


def test_every_round_gives_a_smaller_model_that_loads(layers: Compressed) -> None:
    report = layers.report
    assert [point.number for point in report.curve] == [1, 2, 3]
    assert [point.path for point in report.curve] == ["points/1/model", "points/2/model", "model"]
    sizes = [point.parameters for point in report.curve]
    # Evenly spread, as near as whole layers come.
    for size, wanted in zip(sizes, (1 - 0.5 / 3, 1 - 1 / 3, 0.5), strict=True):
        assert wanted - 0.16 < size <= wanted
    # What is on the disk is as small as the curve says.
    base = _numbers(layers.folder)
    assert [layers.numbers(point.path) / base for point in report.curve] == pytest.approx(sizes)
    assert all(point.bytes < size + 0.05 for point, size in zip(report.curve, sizes, strict=True))
    assert report.goal == "compress" and str(report.target) == "parameters=0.5"
    assert report.verdict.startswith(f"{100 * sizes[-1]:.1f} % of the base's parameters; accuracy ")
    assert sorted(path.name for path in layers.out.iterdir()) == ["model", "points", "report.html", "report.json"]
    assert report.verification.adapter is None and report.verification.model < 1e-3
    assert not (layers.out / "adapter").exists() and report.cost.adapter_bytes == 0
    percents = [percent for _, percent, _ in layers.told]
    assert percents == sorted(percents)


def test_the_curve_is_what_the_written_models_do(layers: Compressed) -> None:
    test_split = _test_split(layers)
    for point in layers.report.curve:
        written: Checkpoint = load(layers.out / point.path)
        outcome = evaluate(written.model, test_split, layers.spec.objective, layout_for(written, test_split))
        assert outcome.correct.mean() == pytest.approx(point.accuracy)
        assert outcome.exact.mean() == pytest.approx(point.exact_match)
        assert outcome.loss.mean() == pytest.approx(point.loss, abs=1e-4)
    last = layers.report.curve[-1]
    assert (last.accuracy, last.exact_match) == (layers.report.adapted.accuracy, layers.report.adapted.exact_match)


def test_components_are_chosen_afresh_on_what_each_round_left(layers: Compressed) -> None:
    pool = _split(layers)
    judged = [pool.pool[row] for row in sorted(row for track in pool.tracks for row in track.judge)]
    base = load(layers.folder)
    layout = layout_for(base, judged)
    gone: set[int] = set()
    for report, point in zip(layers.report.passes, layers.report.curve, strict=True):
        gone |= {int(number) for number in re.findall(r"\d+", point.removed)}
        without: Any = load(layers.folder).model
        kept = [block for k, block in enumerate(without.model.layers) if k not in gone]
        without.model.layers = torch.nn.ModuleList(kept)
        bare = evaluate(without, judged, layers.spec.objective, layout).loss.mean()
        # The loss that removing structures left is that of the base without them: no component is gone yet.
        assert f" to {bare:.3f}; " in report.reason


@pytest.mark.parametrize(
    ("strategy", "options", "target"),
    [
        ("neurons", None, {"parameters": 0.8}),
        ("heads", None, {"bytes": 0.8}),
        ("mixed", None, {"parameters": 0.6}),
        ("blocks", {"size": 16}, {"parameters": 0.6}),
    ],
)
def test_every_strategy_reaches_its_target_on_the_disk(
    strategy: str, options: dict[str, Any] | None, target: dict[str, float], model: Path, tmp_path: Path
) -> None:
    run = Compressed(model, tmp_path / "out", strategy=strategy, strategy_options=options, target=target, passes=2)
    (wanted,) = target.values()
    curve = run.report.curve
    last = curve[-1]
    sizes = [point.bytes if "bytes" in target else point.parameters for point in curve]
    # Of heads so few can go at a time that one round may be enough.
    assert len(curve) == (1 if strategy == "heads" else 2)
    assert sizes[0] <= 1 - (1 - wanted) / 2 + 0.03
    assert sizes[-1] <= wanted + 0.03 and last.parameters <= curve[0].parameters
    assert run.report.verdict.startswith(f"{100 * (last.bytes if 'bytes' in target else last.parameters):.1f} % of")
    assert ("the others as zeros in files as large" in run.report.verdict) == (strategy == "blocks")
    if strategy == "blocks":
        assert last.bytes == pytest.approx(1) and run.report.shipped and run.report.shipped.zeros
    else:
        assert run.numbers("model") == pytest.approx(last.parameters * _numbers(model))
        assert last.bytes <= wanted + 0.03
    removed = {entry.kind for entry in run.report.structures}
    kinds = {"neurons": {"neurons"}, "heads": {"groups"}, "blocks": {"blocks16"}}
    assert removed <= kinds.get(strategy, {"layers", "neurons", "groups"}) and removed


def test_a_round_in_which_nothing_would_go_is_none(model: Path, tmp_path: Path) -> None:
    run = Compressed(model, tmp_path / "out", strategy="layers", target={"parameters": 0.8}, passes=8)
    curve = run.report.curve
    assert 1 <= len(curve) < 8
    assert [point.path for point in curve] == [*(f"points/{k}/model" for k in range(1, len(curve))), "model"]
    sizes = [1.0, *(point.parameters for point in curve)]
    assert all(after < before for before, after in pairwise(sizes))
    base = _numbers(model)
    assert [run.numbers(point.path) / base for point in curve] == pytest.approx(sizes[1:])
    assert sizes[-1] <= 0.8


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gpt2", "float32"), ("gptj", "bfloat16"), ("gemma3", "bfloat16"), ("modernbert", "float32")],
)
def test_layers_of_other_architectures_go_from_the_files(architecture: str, dtype: str, tmp_path: Path) -> None:
    """GPT-2 here scales an attention by its place, so that its layers can be cut off at the end alone."""
    shape: dict[str, Any] = {"n_layer" if architecture.startswith("gpt") else "num_hidden_layers": 4}
    if architecture == "gpt2":
        shape["scale_attn_by_inverse_layer_idx"] = True
    folder = tiny.build(architecture, tmp_path / architecture, dtype, shape=shape)
    checkpoint = load(folder)
    masked = architecture == "modernbert"
    rows = tiny.learnable_examples(96)
    if masked:
        rows = [row | {"prompt": f"{row['prompt']} {checkpoint.tokenizer.mask_token}"} for row in rows]
    block = sum(p.numel() for p in decoder_blocks(checkpoint.model)[1][0].parameters())
    target = 1 - 1.5 * block / checkpoint.model.num_parameters()  # type: ignore[operator]
    run = Compressed(
        folder, tmp_path / "out", strategy="layers", target={"parameters": round(target, 4)}, examples=rows, passes=1
    )
    assert run.report.shipped is not None
    assert run.report.shipped.zeros == []
    assert len(run.report.shipped.layers or []) == 2
    if architecture == "gpt2":
        assert run.report.shipped.layers == [0, 1]
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    written = auto.from_pretrained(run.out / "model")
    assert written.num_parameters() == run.report.shipped.parameters
    assert run.report.verdict.startswith(f"{100 * run.report.curve[-1].parameters:.1f} % of the base's parameters; ")
    assert run.report.curve[-1].parameters == run.report.shipped.parameters / checkpoint.model.num_parameters()  # type: ignore[operator]


def test_a_model_without_a_finite_loss_is_told_in_words() -> None:
    whole, gone = np.array([1.0, 0.0, 1.0]), np.array([2.0, np.inf, np.nan])
    check_compressed(Outcome(whole, whole, np.zeros(3, dtype=np.int64), whole))
    with pytest.raises(InvalidInput, match="no finite loss on 2 of 3 examples; ask for a larger one") as caught:
        check_compressed(Outcome(gone, whole, np.zeros(3, dtype=np.int64), whole))
    assert caught.value.param == "target"


def _test_split(run: Compressed) -> list[Any]:
    """The examples that the job tested on, divided again."""
    return _split(run).test


def _split(run: Compressed) -> Splits:
    base = load(run.folder)
    encoded = encode_for(base, run.spec.examples, prompt_format=run.spec.prompt_format, context=None, name="examples")
    return divide(encoded, None, None, run.spec.seed)


def test_layers_that_are_gone_take_all_that_was_in_them(layers: Compressed) -> None:
    gone = {entry.layer for entry in layers.report.structures}
    assert len(gone) == sum(len(entry.indices) for entry in layers.report.structures)
    assert gone and layers.report.plan
    assert not any(module.layer in gone for module in layers.report.modules if _planned(layers.report, module.module))


def _planned(report: Report, module: str) -> bool:
    return any(entry.module == module for entry in report.plan)


def test_a_latency_is_reached_by_the_size_that_was_measured_to_have_it(deep: Path, tmp_path: Path) -> None:
    run = Compressed(deep, tmp_path / "out", strategy="layers", target={"decode_latency": 0.7}, passes=1)
    (point,) = run.report.curve
    # Half of the layers take about half of the time: what is measured of so small a model is rough.
    assert 0.3 < point.parameters < 0.95
    assert not (run.out / "probe").exists()


@pytest.mark.parametrize(
    ("fields", "least"),
    [
        ({"strategy": "layers", "target": {"parameters": 0.05}}, 0.05),
        ({"strategy": "heads", "target": {"parameters": 0.3}}, 0.3),
        ({"strategy": "neurons", "target": {"bytes": 0.2}}, 0.2),
    ],
)
def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(
    model: Path, tmp_path: Path, fields: dict[str, Any], least: float
) -> None:
    with pytest.raises(InvalidInput, match="can fall to 0") as refusal:
        Compressed(model, tmp_path / "out", **fields)
    assert refusal.value.param == "target"
    told = float(refusal.value.message.partition("can fall to ")[2].partition(" ")[0])
    assert told > least
    # What it says holds.
    (measure,) = fields["target"]
    run = Compressed(model, tmp_path / "reached", **fields | {"target": {measure: told}, "passes": 1})
    assert len(run.report.curve) == 1 and run.report.curve[0].parameters <= told + 0.1


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    data = tmp_path_factory.mktemp("served")
    install(model, data, "six")
    running = ServeProcess(data)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def job(served: ServeProcess) -> dict[str, Any]:
    """A job of few examples, which are cross-fitted."""
    body = spec(
        model="six", examples=tiny.learnable_examples(20), goal="compress", target="parameters=0.6", strategy="layers"
    )
    submitted = served.http.post("/v1/jobs", json=body | {"passes": 2}).json()

    def ended() -> dict[str, Any] | None:
        found = dict(served.http.get(f"/v1/jobs/{submitted['id']}", params={"wait": 30}).json())
        return found if found["finished_at"] else None

    return wait_until(ended, 240, "the job has ended")


def test_a_job_of_few_examples_is_compressed_and_cross_validated(served: ServeProcess, job: dict[str, Any]) -> None:
    assert (job["status"], job["goal"]) == ("succeeded", "compress"), job["error"]
    report = Report.model_validate(served.http.get(f"/v1/jobs/{job['id']}/report").json())
    assert report.splits.cross_validated and report.splits.folds
    assert [point.parameters <= size for point, size in zip(report.curve, (0.8, 0.6), strict=True)] == [True, True]
    assert job["result"]["verdict"] == report.verdict
    listed = served.http.get("/v1/files", params={"purpose": "fine-tune-results"}).json()["data"]
    assert {file["filename"] for file in listed if job["id"] in file["id"]} == {
        "step_metrics.csv",
        "model.zip",
        "report.json",
    }


def test_every_point_is_downloaded(served: ServeProcess, job: dict[str, Any], tmp_path: Path) -> None:
    for point, path in ((1, "points/1/model"), (2, "model")):
        answer = served.http.get(f"/v1/jobs/{job['id']}/model.zip", params={"point": point})
        assert answer.status_code == 200
        with zipfile.ZipFile(BytesIO(answer.content)) as archive:
            archive.extractall(tmp_path)
        unzipped = tmp_path / f"{job['id']}-point-{point}" / "model"
        command = ["download", job["id"], "--point", str(point), "--out", str(tmp_path / "out"), "--url", served.url]
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *command, "--json"], stdout=subprocess.PIPE, check=True
        )
        fetched = {Path(file).relative_to(tmp_path / "out") for file in json.loads(done.stdout)["files"]}
        assert fetched >= {Path(path) / file.name for file in unzipped.iterdir()}
        assert {file.parts[0] for file in fetched} == {path.partition("/")[0], "report.html", "report.json"}
        AutoModelForCausalLM.from_pretrained(unzipped)
        for file in unzipped.iterdir():
            assert (tmp_path / "out" / path / file.name).read_bytes() == file.read_bytes()


def test_the_command_fetches_all_of_a_compressed_job_where_it_is_asked_to(
    served: ServeProcess, job: dict[str, Any], tmp_path: Path
) -> None:
    files = {file["path"] for file in served.http.get(f"/v1/jobs/{job['id']}/files").json()["data"]}
    command = ["download", job["id"], "--model", "--out", str(tmp_path / "out"), "--url", served.url]
    subprocess.run([sys.executable, "-m", "service.cli", *command], stdout=subprocess.PIPE, check=True)
    fetched = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert fetched == files > {"points/1/model/config.json"}


def test_what_is_not_there_is_told_in_words(served: ServeProcess, job: dict[str, Any]) -> None:
    no_adapter = served.http.get(f"/v1/jobs/{job['id']}/adapter.zip")
    assert no_adapter.status_code == 404
    assert "model.zip" in no_adapter.json()["error"]["message"]
    no_point = served.http.get(f"/v1/jobs/{job['id']}/model.zip", params={"point": 3})
    assert (no_point.status_code, no_point.json()["error"]["param"]) == (404, "point")
    assert "1 to 2" in no_point.json()["error"]["message"]


def test_both_models_answer_a_try(served: ServeProcess, job: dict[str, Any]) -> None:
    asked = served.http.post(f"/v1/jobs/{job['id']}/tries", json={"prompt": "Item 3: answer", "max_tokens": 4}).json()
    at = f"/v1/jobs/{job['id']}/tries/{asked['id']}"

    def ended() -> dict[str, Any] | None:
        found = dict(served.http.get(at, params={"wait": 10}).json())
        return found if found["status"] in ("succeeded", "failed") else None

    answer = wait_until(ended, 60, "the try has ended")
    assert answer["status"] == "succeeded", answer
    assert answer["base"] is not None and answer["adapted"] is not None


def test_a_dry_run_counts_every_model(served: ServeProcess, model: Path) -> None:
    def told(**fields: Any) -> dict[str, Any]:
        body = spec(model="six", goal="compress", target="parameters=0.6", strategy="layers") | fields
        return dict(served.http.post("/v1/jobs", params={"dry_run": True}, json=body).json())

    one, four, file = told(passes=1), told(passes=4), told(passes=1, gguf="f16")
    size = models.resolve(model.parent, model.name).bytes
    assert four["disk_bytes"] - one["disk_bytes"] == pytest.approx(3 * size, rel=0.01)
    assert file["disk_bytes"] - one["disk_bytes"] == pytest.approx(size, rel=0.01)
    assert four["stages"]["backward"] >= one["stages"]["backward"]

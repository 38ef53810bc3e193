"""`c2i bench`: all methods on the same rows, a run that survives its death, tables that add up."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner

from service import models
from service.errors import InternalError, InvalidInput, ModelNotFound
from service.jobs import Example, PromptFormat
from service.strategies import C2IOptions, LaserOptions
from tests import live, plain
from tests.live import REPOSITORY
from tests.planted import Planted
from workers import masked
from workers.adaptation import layout_for
from workers.benchmark import fewshot, lora, methods, structures
from workers.benchmark.cells import OBJECTIVE, Bench, Cell, encode_split, prepare
from workers.benchmark.methods import components, majority
from workers.benchmark.plots import write_plots
from workers.benchmark.pooling import pooled
from workers.benchmark.records import CandidateRow, Records, Row, Run
from workers.benchmark.runs import make_row
from workers.benchmark.tables import render, summarise
from workers.benchmark.tasks import Sizes, find_tasks, split
from workers.cli import bench
from workers.evaluation import evaluate
from workers.loading import load
from workers.offline import OFFLINE
from workers.pruning import applied
from workers.search import Search
from workers.strategies import make_search
from workers.subject import Track
from workers.targets import decoder_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = Sizes(24, 24, 40)
METHODS = "majority,fewshot,lora,components:1,components:3"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, planted: Planted) -> Path:
    """Two task files: the planted one, with choices, and an open one."""
    folder = tmp_path_factory.mktemp("tasks")
    closed = [example.model_dump_json() for example in planted.examples]
    (folder / "planted.jsonl").write_text("\n".join(closed) + "\n")
    answers = [" yes", " no", " good"]
    rows = [{"prompt": f"Item {i}: answer", "completion": answers[i % 3]} for i in range(100)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, planted: Planted) -> Path:
    """A data folder with the planted model."""
    data = tmp_path_factory.mktemp("home")
    live.install(planted.folder, data, "tiny/planted")
    return data


@pytest.fixture(scope="module")
def loaded(home: Path) -> Bench:
    model = models.resolve(home / "models", "tiny/planted")
    return Bench.prepare(model, load(model.folder), home / "cache")


def cell_of(loaded: Bench, tasks: Path, name: str, seed: int = 0) -> Cell:
    (task,) = find_tasks(tasks, [name])
    rows = encode_split(loaded.base, split(task, seed, SIZES, loaded.model.id), loaded.model.context_length)
    return prepare(loaded, name, seed, rows)


def run(tasks: Path, home: Path, out: Path, *more: str, seeds: int = 1, chosen: str = METHODS) -> None:
    """The command as a shell would call it; its errors are raised."""
    app = typer.Typer()
    app.command()(bench)
    arguments = ["--data", str(tasks), "--model", "tiny/planted", "--out", str(out), "--seeds", str(seeds)]
    arguments += ["--rows", "24,24,40", "--methods", chosen, *more]
    result = CliRunner().invoke(app, arguments, env=OFFLINE | {"C2I_DATA": str(home)}, catch_exceptions=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def finished(tasks: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: two tasks, two seeds, all methods."""
    out = tmp_path_factory.mktemp("bench") / "run"
    torch.set_num_threads(1)
    run(tasks, home, out, seeds=2)
    return out


def without_times(row: Row) -> Row:
    return row.model_copy(update={"seconds": 0.0, "fb": 0.0, "fb_seconds": 0.0, "test_seconds": 0.0})


# --- a run ------------------------------------------------------------------------------------------------------


def test_a_run_measures_every_method_on_every_cell_and_writes_tables_and_plots(finished: Path) -> None:
    rows = Records(finished).rows()
    expected = {
        (task, method, seed)
        for task in ("items", "planted")
        for method in ("base", *METHODS.split(","))
        for seed in (0, 1)
    }
    assert {(row.task, row.method, row.seed) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert (row.accuracy is None) == (row.task == "items")
        assert row.low <= (row.exact_match if row.accuracy is None else row.accuracy) <= row.high
        assert row.fb == pytest.approx(row.seconds / row.fb_seconds)
        assert len({r.fb_seconds for r in rows if (r.task, r.seed) == (row.task, row.seed)}) == 1
    text = (finished / "results.md").read_text()
    assert text.count("| components, 3 passes |") == 3
    for name in ("accuracy_by_cost.png", "reliability.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_measures_nothing_again(finished: Path, tasks: Path, home: Path) -> None:
    before = (finished / "bench.json").read_bytes()
    (finished / "results.md").unlink()
    run(tasks, home, finished, seeds=2)
    assert (finished / "bench.json").read_bytes() == before
    assert (finished / "results.md").exists()


def test_the_planted_component_is_found_and_the_row_says_so(finished: Path) -> None:
    rows = {(r.task, r.method, r.seed): r for r in Records(finished).rows()}
    base, one = rows["planted", "base", 0], rows["planted", "components:1", 0]
    assert base.accuracy is not None
    assert one.accuracy is not None
    assert one.accuracy > base.accuracy + 0.2
    assert one.p < 0.01
    assert one.gained - one.lost == round((one.accuracy - base.accuracy) * one.n)
    assert one.p == pytest.approx(stats.binomtest(one.gained, one.gained + one.lost).pvalue)
    assert one.lines is not None
    assert (len(one.lines.gained), len(one.lines.lost)) == (one.gained, one.lost)
    assert (len(one.lines.exact_gained), len(one.lines.exact_lost)) == (one.exact_gained, one.exact_lost)
    assert not set(one.lines.gained) & set(one.lines.lost)
    assert base.lines is not None
    assert not base.lines.gained
    assert one.components
    assert one.parameters_touched > 0
    assert one.bytes > 4 * one.parameters_touched


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(
    finished: Path, tasks: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = "import typer; from workers.cli import bench; typer.run(bench)"
    arguments = ["--data", str(tasks), "--model", "tiny/planted", "--out", str(out), "--seeds", "1"]
    arguments += ["--rows", "24,24,40", "--methods", METHODS, "--tasks", "planted"]
    environment = {**os.environ, "C2I_DATA": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if " fewshot: " in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    before = Records(out).rows()
    assert {row.method for row in before} < {row.method for row in Records(finished).rows()}
    run(tasks, home, out, "--tasks", "planted")
    after = Records(out).rows()
    assert after[: len(before)] == before  # not measured again
    mine = [without_times(r) for r in Records(finished).rows() if (r.task, r.seed) == ("planted", 0)]
    assert [without_times(row) for row in after] == mine


def test_a_cell_that_another_process_holds_comes_last(finished: Path, tmp_path: Path) -> None:
    records = Records(tmp_path)
    with records.claim("items", 0, wait=False) as first, records.claim("items", 0, wait=False) as second:
        assert (first, second) == (True, False)
        with records.claim("items", 1, wait=False) as other:
            assert other
    with records.claim("items", 0, wait=False) as again:
        assert again


def test_a_row_is_kept_once_whoever_adds_it(finished: Path, tmp_path: Path) -> None:
    rows = Records(finished).rows()
    records = Records(tmp_path)
    records.add(rows[:3])
    records.add([rows[2].model_copy(update={"seconds": 99.0}), rows[3]])
    assert records.rows() == rows[:4]


def test_what_cannot_be_measured_ends_no_run_and_is_tried_again(tasks: Path, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(
            InternalError, match=r"^1 not measured.*planted seed 0 compress/layers@0\.01: .* can fall to"
        ):
            run(tasks, home, out, "--tasks", "planted", chosen="compress/layers@0.01,majority,components:1")
        assert [row.method for row in Records(out).rows()] == ["base", "majority", "components:1"]
        assert "components, 1 pass" in (out / "results.md").read_text()


def test_a_prompt_with_two_answers_counts_with_the_first(
    tasks: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (tasks / "planted.jsonl").read_text().splitlines()][:88]
    other = {**rows[5], "completion": next(c for c in rows[5]["choices"] if c != rows[5]["completion"])}
    again = {**dict(reversed(rows[6].items())), "choices": rows[6]["choices"][::-1]}
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "planted.jsonl").write_text("\n".join(map(json.dumps, [*rows, other, again])))
    (task,) = find_tasks(folder, None)
    assert (task.lines.objects, task.contradicting) == (rows, 1)
    run(folder, home, tmp_path / "run", chosen="majority")
    assert [row.n for row in Records(tmp_path / "run").rows()] == [40, 40]


@pytest.mark.parametrize("name", ["run.json", "bench.json", "candidates.json"])
def test_a_damaged_record_is_named(finished: Path, tasks: Path, home: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / name).write_text("{")
    with pytest.raises(InvalidInput, match=rf"{name} is damaged or of another version") as caught:
        run(tasks, home, out)
    assert caught.value.param == "out"


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        (["--methods", "lora,magic"], "methods", "magic"),
        (["--methods", "components:9"], "methods", "components:9"),
        (["--tasks", "planted,nothing"], "tasks", "nothing"),
        (["--tasks", ","], "tasks", "no task"),
        (["--seeds", "0"], "seeds", "at least one"),
        (["--rows", "100,100"], "rows", "three numbers"),
        (["--rows", "4,24,40"], "rows", "at least 8"),
        (["--rows", "24,24,4000"], "rows", "4,048 rows"),
        (["--data", "/nowhere"], "data", "no *.jsonl"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_done(
    tasks: Path, home: Path, tmp_path: Path, more: list[str], param: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        run(tasks, home, tmp_path / "out", *more)
    assert caught.value.param == param
    assert words in caught.value.message
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_named(tasks: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        run(tasks, home, tmp_path / "out", "--model", "tiny/absent")


def test_a_bad_example_is_named_by_its_line(tasks: Path, home: Path, tmp_path: Path) -> None:
    lines = (tasks / "planted.jsonl").read_text().splitlines()
    folder = tmp_path / "tasks"
    folder.mkdir()
    bad = {**json.loads(lines[70]), "completion": " maybe"}
    (folder / "planted.jsonl").write_text("\n".join([*lines[:70], json.dumps(bad), *lines[71:88]]))
    with pytest.raises(InvalidInput, match=r"planted\.jsonl:71: completion: not one of the example's choices"):
        run(folder, home, tmp_path / "out")


def test_what_was_refused_may_be_mended_and_measured_in_the_same_folder(
    tasks: Path, home: Path, tmp_path: Path
) -> None:
    lines = (tasks / "planted.jsonl").read_text().splitlines()
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "._planted.jsonl").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves beside a file: no task
    file = folder / "planted.jsonl"
    long = {**json.loads(lines[70]), "prompt": "word " * 400}
    for bad, said in (
        (json.dumps(long).encode(), r"planted\.jsonl:71: prompt: .* tokens"),
        (b'{"prompt": "caf\xe9", "completion": " no"}', r"planted\.jsonl:71: not UTF-8"),
    ):
        file.write_bytes(b"\n".join([*(line.encode() for line in lines[:70]), bad, "\n".join(lines[71:]).encode()]))
        with pytest.raises(InvalidInput, match=said):
            run(folder, home, tmp_path / "out", chosen="base")
    file.write_text("\n".join(lines))
    run(folder, home, tmp_path / "out", chosen="base")
    assert [row.method for row in Records(tmp_path / "out").rows()] == ["base"]


def test_a_run_of_other_rows_is_not_mixed_in(finished: Path, tasks: Path, home: Path, tmp_path: Path) -> None:
    before = (finished / "bench.json").read_bytes()
    with pytest.raises(InvalidInput, match=r"rows 24,24,40, not 24,24,41") as caught:
        run(tasks, home, finished, "--rows", "24,24,41")
    assert caught.value.param == "rows"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.jsonl").write_text((tasks / "items.jsonl").read_text().replace("Item", "Thing"))
    with pytest.raises(InvalidInput, match=r"items\.jsonl is not the file"):
        run(folder, home, finished)
    assert (finished / "bench.json").read_bytes() == before
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InvalidInput, match=r"no run\.json"):
        run(tasks, home, tmp_path)


def test_rows_are_the_first_of_the_seed_s_permutation_without_repeats(tasks: Path, tmp_path: Path) -> None:
    lines = (tasks / "items.jsonl").read_text().splitlines()
    (tmp_path / "items.jsonl").write_text("\n".join([*lines[:50], lines[3], "", *lines[50:]]))
    (task,) = find_tasks(tmp_path, None)
    found = split(task, 5, SIZES, "tiny/planted")
    order = np.random.default_rng(5).permutation(100)
    prompts = [json.loads(lines[i])["prompt"] for i in order[:88]]
    assert [e.prompt for e in (*found.gradient, *found.selection, *found.test)] == prompts


# --- the methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox", "gptj", "phi3", "gemma2", "mistral"])
def test_a_context_run_once_gives_what_the_long_prompt_gives(
    tiny_models: Callable[..., Path], architecture: str
) -> None:
    folder = tiny_models(architecture)
    model: Any = plain.loaded(folder).model
    rows = plain.encoded(folder)
    context = tuple(plain.encoded(folder, [Example(prompt="Answer: yes no yes", completion=" no")])[0].prompt)
    prefixed = fewshot.Prefixed.build(model, context)
    joined = [dataclasses.replace(row, prompt=(*context, *row.prompt)) for row in rows]
    layout = layout_for(plain.loaded(folder), rows)
    if architecture in ("gemma2", "mistral"):  # windows: the context falls out of them
        assert prefixed is None
        return
    assert prefixed is not None
    assert fewshot.agree(prefixed, rows, joined, layout)
    with torch.no_grad():
        expected = [float(plain.loss(model, row, OBJECTIVE)) for row in joined]
    for packed in {layout.packed, False}:
        got = evaluate(prefixed, rows, OBJECTIVE, dataclasses.replace(layout, packed=packed))
        np.testing.assert_allclose(got.loss, expected, rtol=1e-4, atol=1e-4)
    # A context that is another is noticed.
    other = [dataclasses.replace(row, prompt=(*context[::-1], *row.prompt)) for row in rows]
    assert not fewshot.agree(prefixed, rows, other, layout)


def test_few_shot_rows_follow_examples_of_every_label_and_none_of_their_own(loaded: Bench, tasks: Path) -> None:
    (task,) = find_tasks(tasks, ["planted"])
    found = split(task, 0, SIZES, loaded.model.id)
    chosen = fewshot.balanced(found.gradient, 6, seed=0)
    counts = [sum(e.completion == c for e in chosen) for c in {e.completion for e in found.gradient}]
    assert max(counts) - min(counts) <= 1
    assert len({e.prompt for e in chosen}) == 6
    assert fewshot.balanced(found.gradient, 6, seed=0) == chosen
    assert fewshot.balanced(found.gradient, 6, seed=1) != chosen
    cell = cell_of(loaded, tasks, "planted")
    got = fewshot.prompt_with_examples(cell, found.gradient)
    assert got.cached
    # The reference joins texts and runs each row alone.
    shown = fewshot.balanced(found.gradient, fewshot.SHOTS, seed=0)[: got.shots]
    text = "".join(e.prompt + e.completion + "\n\n" for e in shown)
    tokenizer: Any = loaded.base.tokenizer
    prefix = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    for i in range(3):
        row = cell.rows.test[i]
        joined = dataclasses.replace(row, prompt=(*prefix, *row.prompt))
        with torch.no_grad():
            expected = float(plain.loss(loaded.base.model, joined, OBJECTIVE))
        assert got.outcome.loss[i] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("architecture", ["roberta", "distilbert"])
def test_a_masked_model_is_measured_by_every_method(
    tiny_models: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    live.install(tiny_models(architecture), tmp_path, "tiny/masked")
    base = plain.loaded(tmp_path / "models" / "tiny" / "masked")
    mask = base.tokenizer.mask_token
    rows = [
        {"prompt": f"Item {i}: {mask}.", "completion": answer, "choices": ["good", "no"]}
        for i, answer in enumerate(["good", "no"] * 44)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(
        tmp_path / "tasks", tmp_path, tmp_path / "run", "--model", "tiny/masked", chosen="fewshot,lora,c2i,components:2"
    )
    measured = {row.method: row for row in Records(tmp_path / "run").rows()}
    assert set(measured) == {"base", "fewshot", "lora", "c2i", "components:2"}

    model = models.resolve(tmp_path / "models", "tiny/masked")
    bench = Bench.prepare(model, load(model.folder), tmp_path / "cache")
    (task,) = find_tasks(tmp_path / "tasks", None)
    found = split(task, 0, SIZES, "tiny/masked")
    cell = prepare(bench, "items", 0, encode_split(bench.base, found, model.context_length))
    got = fewshot.prompt_with_examples(cell, found.gradient)
    assert got.shots > 0
    # The reference puts the examples' text before the prompt's, and tokenises both together.
    shown = fewshot.balanced(found.gradient, fewshot.SHOTS, seed=0)[: got.shots]
    context = "".join(e.prompt.replace(mask or "", e.completion) + "\n\n" for e in shown)
    joined = [row.model_copy(update={"prompt": context + row.prompt}) for row in found.test[:3]]
    encoded = masked.encode(joined, bench.base.tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="test")
    expected = evaluate(bench.base.model, encoded, OBJECTIVE, cell.layout)
    np.testing.assert_allclose(got.outcome.loss[:3], expected.loss, rtol=1e-4)


def test_lora_lowers_the_loss_and_leaves_the_base_to_the_bit(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    model = loaded.base.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    wanted = [p.requires_grad for p in model.parameters()]
    first = lora.train(cell)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == wanted
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert first.epoch > 0
    assert min(first.selection_losses) == first.selection_losses[first.epoch] < 0.95 * first.selection_losses[0]
    hidden, layers = 32, 2
    # q_proj is 32 x 32, v_proj, of two heads of eight, 32 x 16.
    assert first.parameters == layers * lora.RANK * ((hidden + 32) + (hidden + 16))
    assert first.bytes > 4 * first.parameters
    # Seeded, and its own test is that of the chosen epoch.
    again = lora.train(cell)
    assert again.selection_losses == first.selection_losses
    np.testing.assert_array_equal(again.outcome.loss, first.outcome.loss)
    base = evaluate(model, cell.rows.test, OBJECTIVE, cell.layout)
    np.testing.assert_array_equal(base.loss, cell.base.loss)


def test_lora_that_diverges_is_the_base(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    found = lora.train(cell, learning_rate=1e30)
    assert (found.epoch, found.parameters, found.bytes) == (0, 0, 0)
    assert found.selection_losses[-1] == np.inf
    np.testing.assert_allclose(found.outcome.loss, cell.base.loss, rtol=1e-5)


def test_lora_is_the_same_where_memory_holds_no_example_whole(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    expected = lora.train(cell)
    block = decoder_blocks(loaded.base.model)[1][-1]
    usual = type(block).forward

    def kept_whole(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Out of memory where a backward is to come and the block's activations are kept for it."""
        if torch.is_grad_enabled() and getattr(module.forward, "__func__", None) is usual:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = block.register_forward_hook(kept_whole)
    try:
        found = lora.train(cell)
    finally:
        handle.remove()
    np.testing.assert_allclose(found.selection_losses, expected.selection_losses, rtol=1e-3)
    assert found.epoch == expected.epoch > 0


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "qwen2_moe"])
def test_lora_finds_the_projections_of_other_architectures(tiny_models: Callable[..., Path], architecture: str) -> None:
    model = plain.loaded(tiny_models(architecture)).model
    found = lora.target_modules(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    assert names.issuperset(found)


def test_components_of_one_pass_are_those_of_a_search_that_stops_there(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    together = {name: found for one in components(cell, [1, 3]) for name, found in one.by_method.items()}
    pool, n = [*cell.rows.gradient, *cell.rows.selection], len(cell.rows.gradient)
    track = Track(list(range(n)), list(range(n, len(pool))))
    search = Search(cell.subject, pool, [track], track)
    search.run(1, lambda stage, number, fraction, message: None)
    plan = search.plans[-1]
    with applied(loaded.targets, loaded.spectra, plan):
        expected = evaluate(loaded.base.model, cell.rows.test, OBJECTIVE, cell.layout)
    np.testing.assert_array_equal(together["components:1"].outcome.loss, expected.loss)
    assert together["components:1"].components == plan.size
    assert together["components:1"].seconds < together["components:3"].seconds
    weights = {target.name: target.weight for target in loaded.targets}
    numbers = sum(len(js) * sum(weights[name].shape) for name, js in plan.components.items())
    assert together["components:1"].parameters == numbers


def test_the_majority_is_the_gradient_split_s_and_is_judged_on_the_test_split(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    golds = [row.labels[row.gold] for row in cell.rows.gradient]
    answer = max(dict.fromkeys(golds), key=golds.count)
    expected = [row.labels[row.gold] == answer for row in cell.rows.test]
    np.testing.assert_array_equal(majority(cell).correct, expected)
    np.testing.assert_array_equal(majority(cell).exact, expected)


def test_what_a_search_has_reached_is_kept_where_it_fails_later(
    tasks: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Search.one_pass

    def failing(search: Search, number: int, *more: Any) -> Any:
        if number == 2:
            raise RuntimeError("no second pass")
        return usual(search, number, *more)

    monkeypatch.setattr(Search, "one_pass", failing)
    with pytest.raises(InternalError, match=r"planted seed 0 components:8: RuntimeError: no second pass"):
        run(tasks, home, tmp_path / "out", "--tasks", "planted", chosen="components:1,components:8")
    assert [row.method for row in Records(tmp_path / "out").rows()] == ["base", "components:1"]


def test_units_put_all_numbers_of_passes_into_one_search() -> None:
    names = methods.parse_methods("components:8,lora,components:1")
    assert names == ["base", "components:8", "lora", "components:1"]
    assert methods.units(names) == [["base"], ["lora"], ["components:1", "components:8"]]


# --- tables -----------------------------------------------------------------------------------------------------


def row(task: str, method: str, seed: int, accuracy: float | None, gained: int, lost: int, **more: Any) -> Row:
    exact = more.pop("exact_match", accuracy or 0.0)
    blank: dict[str, Any] = {
        "balanced_accuracy": accuracy, "loss": 1.0, "low": 0.0, "high": 1.0, "p": 1.0, "parameters_touched": 10,
        "bytes": 100, "seconds": 4.0, "fb": 2.0, "fb_seconds": 2.0, "n": 100, "exact_n": 100, "exact_gained": 0,
        "exact_lost": 0, "exact_p": 1.0, "test_seconds": 1.0,
    }  # fmt: skip
    return Row(
        task=task, method=method, seed=seed, accuracy=accuracy, exact_match=exact, gained=gained, lost=lost,
        **(blank | more),
    )  # fmt: skip


def test_the_summary_s_numbers_are_those_computed_by_hand() -> None:
    rows = [
        row("a", "base", 0, 0.5, 0, 0),
        row("a", "base", 1, 0.6, 0, 0),
        row("b", "base", 0, None, 0, 0, exact_match=0.1),
        row("b", "base", 1, None, 0, 0, exact_match=0.2),
        row("a", "lora", 0, 0.9, 45, 5),
        row("a", "lora", 1, 0.8, 25, 5),
        row("b", "lora", 0, None, 12, 2, exact_match=0.2),
        # Four rows lost and none gained is not significant for one seed (p = .125), seven are (p = .016).
        row("a", "components:1", 0, 0.46, 0, 4),
        row("a", "components:1", 1, 0.57, 0, 3),
        row("b", "components:1", 0, None, 30, 0, exact_match=0.4, exact_gained=30),
    ]
    base, lora_row, one = summarise(rows)
    assert [s.method for s in (base, lora_row, one)] == ["base", "lora", "components:1"]
    assert base.metric == pytest.approx((0.5 + 0.6 + 0.1 + 0.2) / 4)
    assert base.spread == pytest.approx(np.std([0.3, 0.4], ddof=1))
    # A task counts once, of however many seeds it has rows.
    assert lora_row.gain == pytest.approx(((0.4 + 0.2) / 2 + 0.1) / 2)
    assert one.gain == pytest.approx(((-0.04 - 0.03) / 2 + 0.3) / 2)
    assert one.share_of_lora == pytest.approx(((-0.04 - 0.03) / 2 + 0.3) / ((0.4 + 0.2) / 2 + 0.1))
    assert one.spread is None  # only seed 0 has both tasks
    assert (lora_row.better, lora_row.worse) == (2, 0)
    assert (one.better, one.worse, one.exact_better, one.exact_worse) == (1, 1, 1, 0)
    assert one.exact_match == pytest.approx(((0.46 + 0.57) / 2 + 0.4) / 2)
    text = render(rows, a_run())
    assert "| components, 1 pass | 3 | 0.458 | +0.133 | 66% | 1/1 | 0.458 | 1/0 |" in text
    interval = stats.binomtest(46 + 57, 200).proportion_ci(method="wilson")
    assert f"{interval.low:.3f} to {interval.high:.3f}" in text
    assert "0.400°" in text


def test_a_row_that_several_seeds_test_counts_once_in_what_is_significant() -> None:
    def lines(gained: list[int], lost: list[int]) -> dict[str, list[int]]:
        return {"gained": gained, "lost": lost, "exact_gained": [], "exact_lost": lost}

    first = row("a", "components:1", 0, 0.5, 1, 5, lines=lines([1], [2, 3, 4, 5, 6]))
    again = row("a", "components:1", 1, 0.5, 2, 4, lines=lines([1, 2], [3, 4, 5, 6]))
    third = row("a", "components:1", 2, 0.5, 0, 2, lines=lines([], [2, 7]))
    assert pooled([first, again]) == (1, 4)  # of line 2 one says this, one that
    assert pooled([first, again], exact=True) == (0, 5)
    assert pooled([first, again, third]) == (1, 6)
    unknown = row("a", "components:1", 2, 0.5, 3, 4, exact_gained=6)
    assert pooled([first, again, unknown]) == (4, 8)
    assert pooled([first, again, unknown], exact=True) == (6, 5)
    # Five lost and none gained are p = .062; twice as many would be p = .002.
    twice = [row("a", "components:1", seed, 0.5, 0, 5, lines=lines([], [1, 2, 3, 4, 5])) for seed in (0, 1)]
    assert summarise([row("a", "base", 0, 0.6, 0, 0), *twice])[1].worse == 0


def test_a_sampled_method_says_what_all_its_candidates_would_take() -> None:
    rows = [row("a", "base", 0, 0.5, 0, 0), row("a", "laser", 0, 0.5, 0, 0, tried=200, tried_of=1800, seconds=400.0)]
    text = render(rows, a_run())
    assert "LASER tried a seeded sample of 200 of its 1,800 candidates" in text
    assert "extrapolated, not measured, to 1.0 hours and 18 FB a cell" in text


def test_plots_take_candidates_of_any_quality(tmp_path: Path) -> None:
    records = Records(tmp_path)
    shared: dict[str, Any] = {"task": "a", "seed": 0, "method": "components", "examples": 10, "base_loss": 2.0}
    records.add(
        [row("a", "base", 0, 0.5, 0, 0), row("a", "lora", 0, 0.5, 0, 0)],
        [
            CandidateRow(**shared, number=1, size=16, predicted_loss=-3.0, loss=50.0, chosen=False),
            CandidateRow(**shared, number=2, size=32, predicted_loss=1.0, loss=1.5, chosen=True),
        ],
    )
    write_plots(records)
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_smaller_models_have_a_table_and_a_picture(tmp_path: Path) -> None:
    records = Records(tmp_path)
    small = {"left": 0.75, "model_bytes": 0.76, "peak_memory": 0.9, "prefill": 1.25, "decode": 1.3, "energy": 0.7}
    records.add(
        [
            row("a", "base", 0, 0.5, 0, 0),
            row("a", "components:8", 0, 0.9, 0, 0),
            row("a", "heads@0.9", 0, 0.4, 0, 0, left=0.89),
            row("a", "compress/layers@0.8", 0, 0.7, 0, 0, **small),
            *(row("a", f"heads@0.{n}", 0, 0.3, 0, 0, left=n / 100) for n in range(60, 88)),
        ]
    )
    write_plots(records)
    assert (tmp_path / "accuracy_by_size.png").stat().st_size > 10_000
    text = render(records.rows(), a_run())
    assert (
        "| compress/layers@0.8 | 1 | 0.750 | 0.700 | 0.700 | 1.000 | 2.0 | 0.76 | 0.90 | 1.25 x | 1.30 x | 0.70 |"
        in text
    )
    assert "| heads@0.9 | 1 | 0.890 | 0.400 | 0.400 | 1.000 | 2.0 |  |  |  |  |  |" in text


def a_run() -> Run:
    return Run(
        started="2026-01-01T00:00:00+00:00", model="tiny", revision="0" * 40, rows=(24, 24, 40), objective="both",
        tasks={}, versions={"torch": "2"}, machine={"processor": "x", "threads": 1, "gpu": "none"},
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["laser", "c2i"])
def test_a_grid_s_row_is_the_plan_that_its_search_takes(
    loaded: Bench, tasks: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "LASER_SAMPLE", 20)
    monkeypatch.setattr(methods, "C2I", C2IOptions(matrices=1, retentions=(0.5, 0.9), row_blocks=(1, 2)))
    cell = cell_of(loaded, tasks, "planted")
    found = methods.grid_search(cell, strategy)
    measured = found.by_method[strategy]
    grid = len(loaded.targets) * len(LaserOptions().retentions)
    assert (measured.tried, measured.tried_of) == ((20, grid) if strategy == "laser" else (4, 4))
    assert len(found.candidates) == measured.tried
    assert sum(candidate.chosen for candidate in found.candidates) <= 1
    assert bool(measured.components) == bool(measured.parameters) == bool(measured.drift)
    again = methods.grid_search(cell, strategy).by_method[strategy]
    np.testing.assert_array_equal(again.outcome.loss, measured.outcome.loss)


def test_drift_is_zero_of_what_changes_no_weight_and_is_known_of_what_does(finished: Path) -> None:
    for row in Records(finished).rows():
        if row.method in ("base", "fewshot"):
            assert row.drift == 0.0
        elif row.method == "majority":
            assert row.drift is None
        else:
            assert row.drift is not None
            assert (row.drift > 0) == (row.parameters_touched > 0)


@pytest.mark.parametrize(
    "name",
    [
        "heads@0.95",
        "heads/michel@0.95",
        "neurons/magnitude@0.9",
        "layers/whole@0.8",
        "blocks/wanda@0.9",
        "blocks/2:4@0.9",
    ],
)
def test_structures_go_until_the_size_is_reached_and_no_further(loaded: Bench, tasks: Path, name: str) -> None:
    cell = cell_of(loaded, tasks, "planted")
    method = structures.parse(name)
    assert isinstance(method, structures.ToSize)
    subject = structures.subject_with(cell, method)
    plan, seconds = structures.plan_to_size(cell, subject, method)
    left = structures.left(subject, plan)
    largest = max(int(unit.sizes.max()) for unit in subject.units)
    total = sum(p.numel() for p in loaded.base.model.parameters())
    assert left <= method.size < left + largest / total
    measured = next(methods.measure(cell, [name], [])).by_method[name]
    assert measured.left == left
    assert measured.seconds > 0 or seconds == 0


def test_unstructured_magnitude_takes_the_smallest_entries_of_all_weights(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    method = structures.parse("magnitude@0.9")
    assert isinstance(method, structures.ToSize)
    subject = structures.subject_with(cell, method)
    plan, _ = structures.plan_to_size(cell, subject, method)
    before = torch.cat([target.whole_weight.abs().flatten() for target in loaded.targets])
    with subject.without(plan):
        after = torch.cat([target.whole_weight.abs().flatten() for target in loaded.targets])
    gone = (after == 0) & (before != 0)
    total = sum(p.numel() for p in loaded.base.model.parameters())
    assert int((after == 0).sum()) == pytest.approx(0.1 * total, rel=0.01)
    assert before[gone].max() <= before[~gone & (before != 0)].min()


def test_a_compressed_model_is_written_and_measured_beside_the_base(loaded: Bench, tasks: Path) -> None:
    cell = cell_of(loaded, tasks, "planted")
    name = "compress/neurons@0.9"
    measured = next(methods.measure(cell, [name], [])).by_method[name]
    row = make_row(cell, name, measured)
    assert row.left is not None
    assert row.left <= 0.9
    assert row.model_bytes == pytest.approx(row.left, abs=0.02)
    assert row.decode is not None
    assert row.decode > 0
    assert row.peak_memory is not None


@pytest.mark.parametrize("name", ["heads", "neurons", "mixed"])
def test_a_pass_of_structures_is_that_of_a_job(loaded: Bench, tasks: Path, name: str) -> None:
    cell = cell_of(loaded, tasks, "planted")
    measured = next(methods.measure(cell, [name], [])).by_method[name]
    method = structures.parse(name)
    assert isinstance(method, structures.OnePass)
    subject = structures.subject_with(cell, method)
    pool = [*cell.rows.gradient, *cell.rows.selection]
    track = Track(list(range(len(cell.rows.gradient))), list(range(len(cell.rows.gradient), len(pool))))
    search = make_search(subject, pool, [track], track, method.options, cell.seed)
    search.run(1, lambda *step, **named: None)
    assert measured.components == search.plans[search.result_after(1)].size


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("heads/wanda", "heads/groups, heads/magnitude, heads/michel"),
        ("magnitude", "magnitude@0.9"),
        ("compress/blocks@0.9", "compress/layers@0.8"),
        ("compress/layers", "compress/layers@0.8"),
        ("mixed@0.8", "layers/whole"),
        ("layer", "no method layer; there are"),
    ],
)
def test_a_method_that_cannot_be_is_told_what_could(name: str, wanted: str) -> None:
    with pytest.raises(InvalidInput, match=wanted) as caught:
        methods.parse_methods(f"base,{name}")
    assert caught.value.param == "methods"

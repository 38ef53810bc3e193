"""The whole way from examples to artifacts, on models that are real but tiny."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from service import models
from service.errors import InvalidInput, UnusableModel
from service.jobs import JobSpec, Objective, Stage
from service.reports import Report
from tests import plain, tiny
from tests.plain import ARCHITECTURES, MIXTURES
from tests.planted import Planted
from workers import spectrum
from workers.adaptation import adapt
from workers.evaluation import evaluate
from workers.examples import Layout
from workers.loading import load
from workers.pruning import applied
from workers.ranking import Plan
from workers.reporting import plan_entries, target_modules
from workers.spectrum import Spectrum, decompose
from workers.subject import Subject
from workers.targets import find_targets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
FILES = ["adapter", "model", "report.html", "report.json"]


class Run:
    """One adaptation, its report and what it told on its way."""

    def __init__(self, folder: Path, out: Path, cache: Path, **fields: Any) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.told: list[tuple[Stage, float, float | None, str]] = []
        self.spec = JobSpec.parse({"model": folder.name, **fields})
        model = models.resolve(folder.parent, folder.name)
        self.report = adapt(self.spec, model, out, cache=cache, on_progress=lambda *step: self.told.append(step))


def rows(planted: Planted, start: int = 0, end: int | None = None) -> list[dict[str, Any]]:
    return [example.model_dump() for example in planted.examples[start:end]]


def open_answers(count: int) -> list[dict[str, Any]]:
    """Answers of several tokens, without choices."""
    answers = [" France is Paris.", " good", " Answer: yes"]
    return [{"prompt": f"Item {i}:", "completion": answers[i % 3]} for i in range(count)]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")


def check(run: Run) -> Report:
    """What holds for every adaptation."""
    report = run.report
    assert {path.name for path in run.out.iterdir()} == {*FILES, *(["factored"] if report.factored else [])}
    assert report.shipped is not None
    assert not report.factored or report.factored.bytes < report.shipped.bytes
    assert Report.model_validate_json((run.out / "report.json").read_text()) == report
    percents = [percent for _, percent, _, _ in run.told]
    assert percents == sorted(percents)
    assert all(0 <= percent <= 100 for percent in percents)
    assert all(eta is None or eta >= 0 for _, _, eta, _ in run.told)
    order = [stage for stage, *_ in run.told]
    assert order[0] is Stage.LOADING
    assert order[-1] is Stage.PUBLISHING
    assert set(order) == set(Stage)
    assert set(report.cost.stages) == set(report.cost.stages_fb) == {stage.value for stage in Stage}
    assert report.cost.fb_seconds > 0
    assert report.cost.adapter_bytes == size_of(run.out / "adapter")
    assert report.cost.model_bytes == size_of(run.out / "model")
    assert max(report.verification.adapter or 0, report.verification.model) < 1e-3
    assert report.removed.components == sum(len(entry.components) for entry in report.plan)
    assert report.removed.structures == sum(len(entry.indices) for entry in report.structures)
    if report.strategy not in ("heads", "mixed"):  # keys go with the last of their heads; structures may overlap
        assert report.removed.parameters == sum(entry.parameters for entry in report.structures)
    assert report.removed.modules >= len({entry.module for entry in report.plan})
    assert bool(report.plan or report.structures) == report.improved
    assert report.adapted.n == report.base.n == report.splits.test
    assert len(report.passes) <= report.passes_requested
    assert report.drift.value is not None
    assert (report.drift.value > 0) == report.improved
    assert (report.first_pass_drift is None) == (report.after_first_pass is None)
    assert report.drift.tokens > 200
    assert report.drift == report.brief().drift
    check_changed(report)
    assert sum(module.components for module in report.modules) == report.model.components
    assert len({module.module for module in report.modules}) == report.model.target_modules
    assert {entry.module for entry in report.plan} <= {module.module for module in report.modules}
    assert all(f".{m.layer}.{m.kind}" in m.module for m in report.modules)
    if not report.improved:
        assert report.adapted == report.base
        assert "The base model is returned." in report.verdict
    for entry in report.plan:
        assert entry.components == sorted(set(entry.components))
        assert 0 < entry.relative_norm <= 1 + 1e-6
    for module in report.modules:
        mine = [entry for entry in report.plan if entry.module == module.module]
        assert sum(len(entry.components) for entry in mine) <= module.components
        assert math.hypot(*(entry.relative_norm for entry in mine)) <= 1 + 1e-6
    return report


def check_changed(report: Report) -> None:
    """The examples that are shown are of those that the figures count."""
    gained = sum(example.adapted_correct and not example.base_correct for example in report.changed)
    lost = sum(example.base_correct and not example.adapted_correct for example in report.changed)
    assert gained == min(report.gained, max(5, 10 - report.lost))
    assert lost == min(report.lost, max(5, 10 - report.gained))
    assert len(report.changed) <= 10
    assert all(example.base_answer != example.adapted_answer for example in report.changed)
    if all(example.choices for example in report.changed):
        for example in report.changed:
            assert (example.base_answer == example.completion) == example.base_correct
            assert (example.adapted_answer == example.completion) == example.adapted_correct
    for metrics in (report.base, report.adapted):
        low, high = metrics.exact_match_interval
        assert low <= metrics.exact_match <= high
        assert (metrics.accuracy is None) == (metrics.accuracy_interval is None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decompositions, shared by all tests, as they are by all jobs."""
    return tmp_path_factory.mktemp("cache")


def test_the_planted_component_is_found_removed_and_the_improvement_proved(
    planted: Planted, tmp_path: Path, cache: Path
) -> None:
    run = Run(planted.folder, tmp_path, cache, examples=rows(planted), passes=1)
    report = check(run)
    assert report.improved
    assert report.verdict.startswith("Improved on 36 unseen examples: accuracy over the choices")
    (entry,) = [entry for entry in report.plan if entry.module == planted.module]
    assert entry.components[0] == 0
    assert report.base.accuracy is not None
    assert report.adapted.accuracy is not None
    assert report.adapted.accuracy > report.base.accuracy + 0.3
    assert report.adapted.loss < report.base.loss
    assert report.difference.metric == "accuracy"
    assert report.difference.value == pytest.approx(report.adapted.accuracy - report.base.accuracy)
    assert report.difference.low > 0
    assert report.base.confusion is not None
    assert sum(row.get(" France", 0) for row in report.base.confusion.values()) > 18  # the collapse is seen
    assert report.after_first_pass == report.adapted
    assert report.model.architecture == "Qwen2ForCausalLM"
    assert report.model.target_modules == 14
    assert report.model.parameters == sum(p.numel() for p in plain.loaded(planted.folder).model.parameters())


def break_one_answer(planted: Planted, out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The planted model with an LM head whose row for `Z` overflows once the planted component is removed.

    Returns:
        The examples, of which none has that answer and so none its loss changed, and one that has it.
    """
    base = load(planted.folder)
    model: Any = base.model
    tokenizer: Any = base.tokenizer
    head = model.get_output_embeddings()
    targets = find_targets(model)[0][-1:]
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
    for plan in (Plan(), Plan({planted.module: (0,)})):
        with torch.no_grad(), applied(targets, {planted.module: decompose(targets[0].weight)}, plan):
            for example in planted.examples:
                model(input_ids=torch.tensor([tokenizer(example.prompt)["input_ids"]]))
    handle.remove()
    before, after = torch.stack(seen).chunk(2)  # (examples, hidden) each
    wanted = torch.cat([torch.full((len(before), 1), -1.0), torch.full((len(after), 1), -6.0)])
    row = 7e37 * torch.linalg.lstsq(torch.stack(seen), wanted).solution[:, 0]
    with torch.no_grad():
        head.weight[tokenizer("Z")["input_ids"][0]] = row
    logits, adapted = before @ row, after @ row
    usable = (logits < 0) & (adapted < 0)
    breaks = (usable & torch.isfinite(logits) & torch.isinf(adapted)).nonzero()[0].item()
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    examples = [example.model_dump() for example, there in zip(planted.examples, usable, strict=True) if there]
    return examples, {"prompt": planted.examples[int(breaks)].prompt, "completion": "Z"}


def test_a_removal_that_breaks_the_model_on_the_test_split_alone_keeps_the_base(
    planted: Planted, tmp_path: Path, cache: Path
) -> None:
    examples, broken = break_one_answer(planted, tmp_path / "models" / "broken")
    run = Run(
        tmp_path / "models" / "broken", tmp_path / "out", cache, examples=examples[:80], test=[*examples[80:], broken]
    )
    report = run.report
    assert report.passes[0].accepted
    assert not report.improved
    assert "the removal leaves the model without a finite loss on 1 of them" in report.verdict
    assert report.adapted == report.base
    assert report.after_first_pass is None
    assert (report.plan, report.first_pass_differences) == ([], [])
    assert Report.model_validate_json((run.out / "report.json").read_text()) == report


def test_a_user_may_trade_gain_for_harmlessness(planted: Planted, tmp_path: Path, cache: Path) -> None:
    free = check(Run(planted.folder, tmp_path / "free", cache, examples=rows(planted), passes=2))
    assert free.max_drift is None
    assert free.first_pass_drift is not None
    assert free.drift.value is not None
    most = free.drift.value / 2
    held = check(Run(planted.folder, tmp_path / "held", cache, examples=rows(planted), passes=2, max_drift=most))
    assert held.max_drift == most
    assert held.improved
    assert held.drift.value is not None
    assert 0 < held.drift.value <= most
    assert any("max_drift" in report.reason for report in held.passes)
    assert f"drift {held.drift.value:.3g} nats a token on neutral text" == str(held.drift)


def test_what_is_published_scores_what_the_report_says(planted: Planted, tmp_path: Path, cache: Path) -> None:
    run = Run(planted.folder, tmp_path, cache, examples=rows(planted, 0, 80), test=rows(planted, 80))
    report = check(run)
    assert report.splits.test == 40
    test = plain.encoded(planted.folder, planted.examples[80:])
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    stock: Any = AutoModelForCausalLM.from_pretrained(planted.folder).eval()
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    for model in (merged, loaded):
        with torch.no_grad():
            losses = [float(plain.loss(model, example, Objective.BOTH)) for example in test]
            hits = [
                int(torch.stack([plain.log_probability(model, e.prompt, c) for c in e.continuations]).argmax())
                == e.gold
                for e in test
            ]
        assert sum(losses) / 40 == pytest.approx(report.adapted.loss, abs=1e-4)
        assert sum(hits) / 40 == report.adapted.accuracy
        exact = [plain.greedy(model, e.prompt, 1) == list(e.continuations[e.gold]) for e in test]
        assert sum(exact) / 40 == report.adapted.exact_match


def test_the_same_seed_gives_the_same_report_and_the_same_artifacts_to_the_bit(
    planted: Planted, tmp_path: Path, cache: Path
) -> None:
    # The second finds every decomposition in the cache, the first none.
    one = Run(planted.folder, tmp_path / "one", tmp_path / "cache", examples=rows(planted), passes=2, seed=5)
    two = Run(planted.folder, tmp_path / "two", tmp_path / "cache", examples=rows(planted), passes=2, seed=5)
    other = Run(planted.folder, tmp_path / "other", tmp_path / "cache", examples=rows(planted), passes=2, seed=6)

    def timeless(report: Report) -> dict[str, Any]:
        told = report.model_dump(exclude={"cost": True, "outlook": True, "passes": {"__all__": {"seconds"}}})
        for one_pass in told["passes"]:
            for candidate in one_pass["candidates"]:
                del candidate["seconds"]
        return told

    assert timeless(one.report) == timeless(two.report)
    assert timeless(one.report) != timeless(other.report)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and not path.name.startswith("report."):
            twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
            assert twin.read_bytes() == path.read_bytes(), path.name


def test_a_second_job_on_a_model_decomposes_nothing_and_one_on_changed_weights_only_these(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed: list[Tensor] = []

    def counted(W: Tensor) -> Spectrum:
        decomposed.append(W)
        return decompose(W)

    monkeypatch.setattr(spectrum, "decompose", counted)
    for name, passes in (("first", 1), ("second", 2)):
        Run(planted.folder, tmp_path / name, tmp_path / "cache", examples=rows(planted), passes=passes)
    first = Report.model_validate_json((tmp_path / "first" / "report.json").read_text())
    modules = first.model.target_modules
    assert len(decomposed) == modules
    # The adapted model is another only in the weights that were pruned.
    shutil.copytree(tmp_path / "first" / "model", tmp_path / "models" / "adapted")
    report = Run(tmp_path / "models" / "adapted", tmp_path / "third", tmp_path / "cache", examples=rows(planted)).report
    assert report.model.target_modules == modules
    assert len(decomposed) == modules + first.removed.modules
    assert 0 < first.removed.modules < modules


def test_passes_go_on_while_they_help_and_all_of_them_are_reported(
    tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    report = check(Run(tiny_models("llama"), tmp_path, cache, examples=open_answers(120), passes=3))
    accepted = [p for p in report.passes if p.accepted]
    assert len(accepted) >= 2
    assert [p.number for p in report.passes] == list(range(1, len(report.passes) + 1))
    assert report.removed.components == sum(p.chosen for p in accepted)  # none removed twice
    for before, after in zip(report.passes, report.passes[1:], strict=False):
        assert after.base_loss == pytest.approx(before.loss)
        assert before.accepted
    assert report.after_first_pass is not None
    assert report.after_first_pass != report.adapted
    assert report.outlook.message


def test_open_answers_of_several_tokens(tiny_models: TinyModels, tmp_path: Path, cache: Path) -> None:
    report = check(Run(tiny_models("llama"), tmp_path, cache, examples=open_answers(60)))
    assert report.base.accuracy is None
    assert report.base.confusion is None
    assert [d.metric for d in report.differences] == ["exact_match", "loss"]
    assert report.adapted.loss < report.base.loss
    assert report.improved


def test_choices_that_differ_from_row_to_row_beside_open_answers(
    tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    pool = [" yes", " no", " positive", " position", " negative", " France", " yes no"]
    examples: list[dict[str, Any]] = []
    for i in range(64):
        choices = [pool[(i + k) % 7] for k in range(2 + i % 4)]
        examples.append({"prompt": f"Row {i} asks", "completion": choices[i % len(choices)], "choices": choices})
        if i % 8 == 0:
            examples[-1] = {"prompt": f"Row {i} asks", "completion": pool[i % 7]}
    report = check(Run(tiny_models("gpt2"), tmp_path, cache, examples=examples))
    assert report.base.accuracy is not None
    assert report.base.confusion is not None
    counted = sum(sum(row.values()) for row in report.base.confusion.values())
    assert 0 < counted < report.base.n  # the open ones are not among them


def test_the_chat_format(tiny_models: TinyModels, tmp_path: Path, cache: Path) -> None:
    examples = tiny.learnable_examples(64)
    chat = check(Run(tiny_models("llama"), tmp_path / "c", cache, examples=examples, prompt_format="chat"))
    text = check(Run(tiny_models("llama"), tmp_path / "t", cache, examples=examples))
    assert chat.prompt_format == "chat"
    assert chat.base.loss != pytest.approx(text.base.loss, abs=1e-3)


@pytest.mark.parametrize("objective", list(Objective))
def test_every_objective(objective: Objective, planted: Planted, tmp_path: Path, cache: Path) -> None:
    report = check(Run(planted.folder, tmp_path, cache, examples=rows(planted), objective=objective))
    assert report.objective is objective
    test_rows = Layout(packed=True)
    found = evaluate(
        plain.loaded(planted.folder).model, plain.encoded(planted.folder, planted.examples), objective, test_rows
    )
    assert report.base.loss == pytest.approx(found.loss.mean(), rel=0.25)


def test_eight_examples_are_enough_to_be_cross_validated(planted: Planted, tmp_path: Path, cache: Path) -> None:
    report = check(Run(planted.folder, tmp_path, cache, examples=rows(planted, 0, 8)))
    assert report.splits.cross_validated
    assert (report.splits.gradient, report.splits.selection, report.splits.test) == (8, 8, 8)
    assert report.base.n == 8


def test_forty_examples_cross_fitted_find_the_planted_component(planted: Planted, tmp_path: Path, cache: Path) -> None:
    report = check(
        Run(planted.folder, tmp_path, cache, examples=rows(planted, 0, 40), test=rows(planted, 40), passes=2)
    )
    assert len(report.passes) == 2
    assert report.improved
    assert report.splits.folds
    assert not report.splits.cross_validated
    assert 0 in next(entry.components for entry in report.plan if entry.module == planted.module)


def test_validation_and_test_that_the_job_brings_are_used_as_such(
    planted: Planted, tmp_path: Path, cache: Path
) -> None:
    report = check(
        Run(
            planted.folder,
            tmp_path,
            cache,
            examples=rows(planted, 0, 40),
            validation=rows(planted, 40, 70),
            test=rows(planted, 70),
        )
    )
    sizes = report.splits
    assert (sizes.gradient, sizes.selection, sizes.test, sizes.folds) == (40, 30, 50, None)
    test = plain.encoded(planted.folder, planted.examples[70:])
    base = evaluate(plain.loaded(planted.folder).model, test, Objective.BOTH, Layout(packed=True))
    assert report.base.loss == pytest.approx(base.loss.mean(), abs=1e-4)
    validation = plain.encoded(planted.folder, planted.examples[40:70])
    selection = evaluate(plain.loaded(planted.folder).model, validation, Objective.BOTH, Layout(packed=True))
    assert report.passes[0].base_loss == pytest.approx(selection.loss.mean(), abs=1e-4)


def test_duplicates_are_dropped_and_counted(planted: Planted, tmp_path: Path, cache: Path) -> None:
    report = check(Run(planted.folder, tmp_path, cache, examples=[*rows(planted, 0, 60), *rows(planted, 0, 10)]))
    assert report.splits.duplicates_dropped == 10
    assert report.splits.gradient + report.splits.selection + report.splits.test == 60


def test_where_nothing_helps_the_base_is_returned_byte_for_byte(planted: Planted, tmp_path: Path, cache: Path) -> None:
    # Validated by answers that are never right where it was ranked.
    wrong = [row | {"completion": " France"} for row in rows(planted, 60, 90)]
    report = check(
        Run(planted.folder, tmp_path, cache, examples=rows(planted, 0, 60), validation=wrong, test=rows(planted, 90))
    )
    assert not report.improved
    assert report.removed.components == 0
    assert report.after_first_pass is None
    assert "was not accepted" in report.outlook.message
    for path in planted.folder.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_what_the_selection_split_accepts_and_the_test_split_refutes_is_not_returned(
    planted: Planted, tmp_path: Path, cache: Path
) -> None:
    wrong = [row | {"completion": " France"} for row in rows(planted, 90)]
    report = check(
        Run(
            planted.folder, tmp_path, cache, examples=rows(planted, 0, 60), validation=rows(planted, 60, 90), test=wrong
        )
    )
    assert report.passes[0].accepted
    assert not report.improved
    assert report.verdict.startswith("Worse than the base on 30 unseen examples: accuracy")
    assert report.removed.components == 0
    assert report.after_first_pass is not None  # what was found and refuted is still told
    assert report.after_first_pass.loss > report.base.loss
    for path in planted.folder.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_every_architecture(architecture: str, tiny_models: TinyModels, tmp_path: Path, cache: Path) -> None:
    report = check(Run(tiny_models(architecture), tmp_path, cache, examples=tiny.learnable_examples(60)))
    skipped = {skip.module.rpartition(".")[2] for skip in report.skipped_modules}
    assert skipped == ({"gate", "experts"} if architecture in MIXTURES else set())
    assert report.model.components > 100


STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("components", {"row_blocks": 4}),
    ("laser", {"sample": 12}),
    ("laser", {"retentions": [0.2, 0.6], "order": "first_first", "compose": 2}),
    ("c2i", {"matrices": 1, "retentions": [0.5, 0.1], "row_blocks": [1, 4]}),
    ("c2i", {"matrices": 2, "retentions": [0.3], "row_blocks": [2], "clusters": "kmeans", "same_samples": True}),
]


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES, ids=str)
@pytest.mark.parametrize(("architecture", "count"), [("llama", 60), ("gpt2", 60), ("qwen2", 60), ("gpt2", 16)])
def test_every_strategy(
    architecture: str,
    strategy: str,
    options: dict[str, Any],
    count: int,
    tiny_models: TinyModels,
    tmp_path: Path,
    cache: Path,
) -> None:
    examples = open_answers(count)
    run = Run(
        tiny_models(architecture), tmp_path, cache, examples=examples, strategy=strategy, strategy_options=options
    )
    report = check(run)
    assert report.strategy == strategy
    assert report.strategy_options == run.spec.options
    assert report.strategy_options is not None
    assert report.strategy_options.model_dump(mode="json").items() >= options.items()
    assert report.splits.folds == (4 if count == 16 else None)
    assert report.splits.selection == (24 if options.get("same_samples") and count == 60 else {16: 16, 60: 18}[count])
    assert report.passes[0].candidates
    assert all(candidate.description for candidate in report.passes[0].candidates)
    assert report.model.target_modules == len(plain.targets_of(tiny_models(architecture))[0])


def test_of_a_weight_that_lost_in_row_blocks_the_report_counts_those_of_the_blocks(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    targets, spectra = plain.targets_of(folder)
    whole = next(target for target in targets if target.name.endswith("1.mlp.up_proj"))
    blocks = whole.split(4)
    layout = Layout(packed=True)
    subject = Subject(plain.loaded(folder).model, targets, spectra, Objective.BOTH, layout).with_targets(blocks)
    plan = Plan({block.name: tuple(range(min(block.shape))) for block in blocks})
    modules = {module.module: module for module in target_modules(targets, subject, plan)}
    assert list(modules) == [target.name for target in targets]
    assert modules[whole.name].components == sum(min(block.shape) for block in blocks) > min(whole.shape)
    assert all(modules[target.name].components == min(target.shape) for target in targets if target is not whole)
    norms = [entry.relative_norm for entry in plan_entries(subject, plan)]
    assert len(norms) == 4
    assert math.hypot(*norms) == pytest.approx(1)  # all of it is gone


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype(dtype: str, tiny_models: TinyModels, tmp_path: Path, cache: Path) -> None:
    run = Run(tiny_models("llama", dtype), tmp_path, cache, examples=tiny.learnable_examples(60))
    assert run.report.model.dtype == dtype
    assert (run.report.rounding_loss is None) == (dtype == "float64")
    assert {path.name for path in tmp_path.iterdir()} - {"factored"} == set(FILES)


# --- what is refused --------------------------------------------------------------------------------------------


def test_an_example_over_the_context_is_refused_before_anything_is_computed(
    tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    examples = [*tiny.learnable_examples(12), {"prompt": "red " * 400, "completion": " yes"}]
    with pytest.raises(InvalidInput, match="the model's context is 256") as refused:
        Run(tiny_models("llama"), tmp_path, cache, examples=examples)
    assert refused.value.param == "examples[12].prompt"
    assert list(tmp_path.iterdir()) == []


def test_too_few_different_examples_are_refused(tiny_models: TinyModels, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InvalidInput, match="different"):
        Run(tiny_models("llama"), tmp_path, cache, examples=tiny.learnable_examples(4) * 3)


def test_a_model_with_nan_in_it_is_refused(tmp_path: Path, cache: Path) -> None:
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")

    folder = tiny.build("llama", tmp_path / "poisoned", prepare=poison)
    with pytest.raises(UnusableModel, match=r"model\.norm\.weight holds NaN"):
        Run(folder, tmp_path / "out", cache, examples=tiny.learnable_examples(12))


def test_an_error_leaves_no_report(planted: Planted, tmp_path: Path, cache: Path) -> None:
    def stop(stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None:
        if stage is Stage.PUBLISHING:
            raise KeyboardInterrupt

    spec = JobSpec.parse({"model": planted.folder.name, "examples": rows(planted, 0, 60)})
    model = models.resolve(planted.folder.parent, planted.folder.name)
    with pytest.raises(KeyboardInterrupt):
        adapt(spec, model, tmp_path, cache=cache, on_progress=stop)
    assert not (tmp_path / "report.json").exists()


def test_the_report_is_written_in_json_that_any_reader_takes(planted: Planted, tmp_path: Path, cache: Path) -> None:
    Run(planted.folder, tmp_path, cache, examples=rows(planted, 0, 60))

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    raw = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert raw["schema_version"] == 1
    assert {"torch", "transformers", "peft", "python", "platform"} <= set(raw["versions"])

"""Strategies of structures: what was planted is found, removed and told; every one goes the whole way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import InvalidInput
from service.jobs import Example, JobSpec, Objective
from tests import plain, tiny
from tests.planted import LABELS, SPOILER, Planted, mean_input, prompts
from tests.test_adaptation import Run, check, open_answers, rows
from workers.evaluation import evaluate
from workers.examples import Layout
from workers.loading import load
from workers.ranking import Ranking, rank
from workers.structural import Composed, Layers, Mixed, coarse_sizes
from workers.structures import Kind, find_units
from workers.targets import find_targets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def plant_structure(folder: Path, out: Path, kind: Kind, index: int) -> tuple[Planted, int]:
    """A model whose last structure of a kind pushes every answer towards one that is never right; and that
    structure's index: for neurons the most active one's.

    Examples are labelled by the model without that structure.
    """
    model: Any = load(folder).model
    tokenizer: Any = plain.loaded(folder).tokenizer
    unit = find_units(model, find_targets(model)[0], {kind})[0][-1]
    target = unit.targets[0]
    texts, choices = prompts(90), [*LABELS, SPOILER]
    u = model.get_output_embeddings().weight[tokenizer(SPOILER)["input_ids"][0]].detach()
    v = mean_input(model, target, plain.encoded(folder, [Example(prompt=t, completion=SPOILER) for t in texts]))
    W = target.weight
    size = torch.linalg.matrix_norm(W, 2)
    if kind is Kind.NEURONS:
        index = int(v.abs().argmax())
    push = torch.outer(u / u.norm(), v)
    rest = push.clone()
    unit.clear(rest, [index])
    unit.clear(W, [index])
    unlabelled = plain.encoded(folder, [Example(prompt=t, completion=LABELS[0], choices=LABELS) for t in texts])
    answers = evaluate(model, unlabelled, Objective.CHOICE, Layout(packed=True)).predicted
    W.add_(3 * size * (push - rest) / (push - rest).square().sum())
    model.save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    examples = [Example(prompt=t, completion=LABELS[k], choices=choices) for t, k in zip(texts, answers, strict=True)]
    return Planted(out, unit.place, examples), index


PLANTED: list[tuple[str, dict[str, Any], Kind, int]] = [
    ("heads", {}, Kind.HEADS, 1),
    ("heads", {"groups": True}, Kind.GROUPS, 1),
    ("neurons", {}, Kind.NEURONS, 0),
    ("layers", {}, Kind.MLP, 0),
    ("mixed", {"kinds": ["heads", "neurons"]}, Kind.HEADS, 2),
]


@pytest.mark.parametrize(("strategy", "options", "kind", "index"), PLANTED, ids=str)
def test_a_planted_structure_is_found_removed_and_told(
    strategy: str, options: dict[str, Any], kind: Kind, index: int, tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    planted, index = plant_structure(tiny_models("qwen2"), tmp_path / "planted", kind, index)
    run = Run(
        planted.folder, tmp_path / "out", cache, examples=rows(planted), strategy=strategy, strategy_options=options
    )
    report = check(run)
    assert report.improved
    assert report.base.accuracy is not None
    assert report.adapted.accuracy is not None
    assert report.adapted.accuracy > report.base.accuracy + 0.3
    (found,) = [entry for entry in report.structures if entry.unit == planted.module]
    assert found.kind == kind
    assert index in found.indices
    assert found.parameters > 0
    assert report.removed.components == 0


EVERY: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "blocks", {"size": 16}),
    ("gpt2", "blocks", {"pattern": "2:4"}),
    ("llama", "blocks", {"size": 16, "score": "wanda"}),
    ("gpt2", "blocks", {"size": 32, "score": "magnitude"}),
    ("llama", "layers", {"parts": "whole", "score": "block_influence"}),
    ("gpt2", "layers", {"parts": "sublayers"}),
    ("llama", "heads", {"score": "michel"}),
    ("gpt2", "heads", {"score": "magnitude"}),
    ("llama", "neurons", {"score": "magnitude"}),
    ("gpt2", "mixed", {}),
    ("llama", "mixed", {"kinds": ["components", "groups", "layers", "blocks"]}),
]


@pytest.mark.parametrize(("architecture", "strategy", "options"), EVERY, ids=str)
def test_every_strategy_and_score_goes_the_whole_way(
    architecture: str, strategy: str, options: dict[str, Any], tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    run = Run(
        tiny_models(architecture),
        tmp_path,
        cache,
        examples=open_answers(16 if strategy == "mixed" else 60),
        strategy=strategy,
        strategy_options=options,
        passes=2,
    )
    report = check(run)
    assert report.passes[0].candidates
    assert report.strategy_options == run.spec.options
    assert {skipped.reason for skipped in report.skipped_modules} == set()


def test_options_of_structures_that_mean_nothing_are_refused() -> None:
    examples = open_answers(8)
    for strategy, options, param in (
        ("layers", {"score": "block_influence"}, "strategy_options"),
        ("heads", {"score": "wanda"}, "strategy_options.score"),
        ("blocks", {"size": 8}, "strategy_options.size"),
        ("mixed", {"kinds": []}, "strategy_options.kinds"),
    ):
        with pytest.raises(InvalidInput) as caught:
            JobSpec.parse({"model": "m", "examples": examples, "strategy": strategy, "strategy_options": options})
        assert caught.value.param == param


def ranking() -> Ranking:
    """Two components of a weight, one head: certain, but of few and of many parameters."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 0.1
    means = torch.tensor([0.3, 0.05, 0.4], dtype=torch.float64)
    a = means + noise - noise.mean(0)
    return rank({"w": a[:, :2], "x:heads": a[:, 2:]})


def test_a_mixed_search_has_each_kind_alone_everything_by_t_and_everything_by_effect_a_parameter() -> None:
    mixed = Mixed({"w": torch.tensor([10, 10]), "x:heads": torch.tensor([1000])})
    proposals = mixed.propose([ranking()], [], loss=100.0)
    largest = [growing.candidates[-1].addition(0) for growing in proposals.lists]
    assert [plan.size for plan in largest] == [2, 2, 1, 3, 3]
    assert [bool(plan.structures) for plan in largest] == [False, False, True, True, True]
    first = [growing.of_size(1).addition(0) for growing in proposals.lists]
    assert first[3].structures == {"x:heads": (0,)}
    assert first[4].components == {"w": (0,)}
    assert Composed("by t")(ranking(), 3) == "1 head and 2 components by t"


def test_a_list_of_layers_has_no_part_of_a_layer_that_stands_before_it(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    units = find_units(plain.loaded(folder).model, plain.targets_of(folder)[0], {Kind.LAYERS, Kind.MLP})[0]
    means = {"model.layers.0:all": 3.0, "model.layers.0.mlp:all": 2.0, "model.layers.1.mlp:all": 2.5}
    noise = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    ranking = rank({name: mean + noise for name, mean in (means | {"model.layers.1:all": 1.0}).items()})
    by_t, by_effect = Layers("layer or sub-layer", units).propose([ranking], [], loss=1.0).lists
    for growing in (by_t, by_effect):
        first = [set(growing.of_size(n).addition(0).structures) for n in (1, 2, 3)]
        assert first[0] == {"model.layers.0:all"}
        assert first[1] == {"model.layers.0:all", "model.layers.1.mlp:all"}
        # Of the second layer the attention is still there.
        assert first[2] == first[1] | {"model.layers.1:all"}
        assert [candidate.size for candidate in growing.candidates] == [1, 2, 3]


def test_plans_of_layers_grow_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a = 1 + 0.1 * torch.randn(40, 10, generator=generator, dtype=torch.float64)
    assert coarse_sizes(rank({f"l.{k}:all": a[:, k : k + 1] for k in range(10)}), 1.0) == [1, 2, 3, 4, 6, 8, 10]
    assert coarse_sizes(rank({}), 1.0) == []

"""Structures against what knows nothing of hooks on gradients: a gate's finite difference, and a gate that is zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.jobs import Objective
from tests import plain, test_masked, tiny
from tests.plain import ARCHITECTURES, MIXTURES, loaded, targets_of
from workers.branches import find_branches
from workers.evaluation import evaluate
from workers.examples import Encoded, Layout
from workers.gradients import effects
from workers.structures import Columns, Kind, Unit, Whole, find_units, tile_units

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]
MASKED = list(tiny.MASKED)
FLAT = Layout(packed=False)
SIDE = 20  # of tiles: no size of a tiny model is a multiple of it
STEP = 1e-5  # wider ones step over kinks of ReLU
# The blocks of a mixture of experts are more than an attention and an MLP, those of MobileBERT have bottlenecks.
WITHOUT_LAYERS = [*MIXTURES, "mobilebert"]


@pytest.fixture
def double() -> Iterator[None]:
    """For the length of a test, float64 models compute in float64 throughout."""
    with plain.double_throughout():
        yield


def units_of(folder: Path) -> list[Unit]:
    """All structures of a model, but for tiles."""
    return find_units(loaded(folder).model, targets_of(folder)[0], set(Kind))[0]


def pool_of(architecture: str, folder: Path) -> list[Encoded]:
    return test_masked.encoded(folder) if architecture in MASKED else plain.encoded(folder)


@contextmanager
def gated(unit: Unit, gates: Tensor) -> Iterator[None]:
    """The model with each structure of a unit multiplied by its gate (count,), by hooks alone."""
    with ExitStack() as stack:
        if isinstance(unit, Columns):
            each = gates.repeat_interleave(unit.width)

            def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                return (inputs[0] * each.to(inputs[0].dtype), *inputs[1:])

            stack.callback(unit.branch.output.module.register_forward_pre_hook(before).remove)
        else:
            assert isinstance(unit, Whole)

            def behind(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
                return output * gates.to(output.dtype)

            for branch in unit.branches:
                stack.callback(branch.end.register_forward_hook(behind).remove)
        yield


def losses(model: nn.Module, pool: Sequence[Encoded]) -> Tensor:
    return torch.from_numpy(evaluate(model, pool, Objective.BOTH, FLAT).loss)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES + MASKED)
def test_an_effect_is_the_slope_of_each_examples_loss_along_its_gate(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    model, pool, targets = loaded(folder).model, pool_of(architecture, folder), targets_of(folder)[0]
    units, tiles = units_of(folder), tile_units(targets, SIDE)
    found, unreached = effects(model, [], {}, pool, Objective.BOTH, FLAT, units=[*units, *tiles])
    draw = torch.Generator().manual_seed(0)
    for unit in units:
        # All gates of a unit at once, each by an amount of its own.
        direction = torch.randn(unit.count, generator=draw, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with gated(unit, 1 + sign * STEP * direction):
                ends.append(losses(model, pool))
        slope = (ends[0] - ends[1]) / (2 * STEP)
        a = found.by_module[unit.name]
        assert a.shape == (len(pool), unit.count)
        assert float(a.abs().max()) > 0 or unit.name in unreached
        torch.testing.assert_close(a @ direction, slope, rtol=1e-3, atol=1e-6 * float(a.abs().max()))
    for unit in tiles:
        if unit.name in unreached:
            continue
        direction = torch.randn(unit.count, generator=draw, dtype=torch.float64)
        W = unit.targets[0].whole_weight
        change = torch.zeros_like(W)
        for k in range(unit.count):
            kept = W.clone()
            unit.clear(kept, [k])
            assert int((W - kept != 0).sum()) == int(unit.sizes[k])
            change += direction[k] * (W - kept)
        ends = []
        for sign in (1, -1):
            with plain.nudged(W, sign * STEP * change):
                ends.append(losses(model, pool))
        slope = (ends[0] - ends[1]) / (2 * STEP)
        a = found.by_module[unit.name]
        torch.testing.assert_close(a @ direction, slope, rtol=1e-3, atol=1e-6 * float(a.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES + MASKED)
def test_every_head_neuron_and_layer_is_found_once(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    units = units_of(folder)
    layers = 1 if architecture == "albert" else len([u for u in units if u.kind == Kind.ATTENTION])
    assert layers == {"albert": 1, "modernbert": 3}.get(architecture, tiny.LAYERS)
    assert len({unit.name for unit in units}) == len(units)
    counts = {kind: [u.count for u in units if u.kind == kind] for kind in Kind}
    assert counts[Kind.HEADS] == [4] * layers
    shared = "num_key_value_heads" in (tiny.ARCHITECTURES | tiny.MIXTURES | tiny.MASKED)[architecture][1]
    assert counts[Kind.GROUPS] == [2 if shared and architecture != "phi" else 4] * layers
    assert counts[Kind.LAYERS] == ([] if architecture in WITHOUT_LAYERS else [1] * layers)
    if architecture not in MIXTURES:
        neurons = {"gpt2": 128, "gptj": 128, "gpt_neox": 64, "gpt_neo": 64}.get(architecture, 48)
        assert counts[Kind.NEURONS] == [neurons] * layers * (2 if architecture == "mobilebert" else 1)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in MIXTURES])
def test_a_layer_counts_all_matrices_of_its_block_and_heads_and_neurons_their_rows_and_columns(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    by_kind = {kind: [u for u in units_of(folder) if u.kind == kind] for kind in Kind}
    whole = sum(sum(p.numel() for p in t.module.parameters()) for t in targets_of(folder)[0])
    assert sum(int(u.sizes.sum()) for u in by_kind[Kind.LAYERS]) == whole
    for parts, all_of in ((Kind.NEURONS, Kind.MLP), (Kind.GROUPS, Kind.ATTENTION)):
        for unit, branch in zip(by_kind[parts], by_kind[all_of], strict=True):
            # What is left when all are gone is the bias of the output alone.
            bias = branch.targets[0].bias
            assert int(unit.sizes.sum()) == int(branch.sizes.sum()) - (0 if bias is None else bias.numel())


def test_what_cannot_be_found_is_named(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    checkpoint, targets = loaded(folder), targets_of(folder)[0]
    config: Any = checkpoint.model.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "num_key_value_heads", 4)
        branches, skipped = find_branches(checkpoint.model, targets)
    assert [branch.part for branch in branches] == ["mlp", "mlp"]
    assert [s.module for s in skipped] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert "4 of keys need [32, 32, 32]" in skipped[0].reason
    units, skipped = find_units(loaded(tiny_models("mixtral")).model, targets_of(tiny_models("mixtral"))[0], {Kind.MLP})
    assert not units
    assert {s.reason for s in skipped} == {"no projections of its mlp are known by name"}
    targets = [target for target in targets if target.name != "model.layers.1.mlp.up_proj"]
    units, skipped = find_units(checkpoint.model, targets, {Kind.LAYERS, Kind.HEADS})
    assert [unit.name for unit in units] == [
        "model.layers.0.self_attn:heads",
        "model.layers.1.self_attn:heads",
        "model.layers.0:all",
    ]
    assert "model.layers.1" in {s.module for s in skipped}

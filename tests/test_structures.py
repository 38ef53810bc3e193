"""Structures against what knows nothing of hooks on gradients: a gate's finite difference, and a gate that is zero."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from service.jobs import Objective
from tests import plain, test_masked, tiny
from tests.plain import ARCHITECTURES, MIXTURES, loaded, targets_of
from workers.adapters import updates
from workers.applying import Factors
from workers.branches import find_branches
from workers.checkpoints import reload_check, write_adapter, write_model
from workers.evaluation import answer_logits, evaluate
from workers.examples import Encoded, Layout, batches
from workers.gradients import effects
from workers.loading import load
from workers.pruning import applied
from workers.ranking import Indices, Plan
from workers.spectrum import decompose
from workers.structures import (
    Columns,
    Kind,
    TurningLayer,
    Unit,
    WandaTiles,
    Whole,
    find_units,
    pattern_units,
    tile_units,
)
from workers.targets import decoder_blocks, find_targets

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


@pytest.mark.usefixtures("double")
def test_the_effect_of_a_pattern_is_the_slope_along_the_smaller_two_of_every_four(tiny_models: TinyModels) -> None:
    folder = tiny_models("gpt2", "float64")
    model, pool, targets = loaded(folder).model, plain.encoded(folder), targets_of(folder)[0]
    units, skipped = pattern_units(targets)
    assert not skipped
    found, _ = effects(model, [], {}, pool, Objective.BOTH, FLAT, units=units)
    for unit, target in zip(units, targets, strict=True):
        W = target.weight.clone()
        unit.clear(W, [0])
        fours, kept = target.weight.abs().reshape(-1, 4), W.abs().reshape(-1, 4)
        assert bool((kept.count_nonzero(1) == 2).all())
        torch.testing.assert_close(kept.sort(1).values[:, 2:], fours.sort(1).values[:, 2:])
        gone, ends = target.weight - W, []
        for sign in (1, -1):
            with plain.nudged(target.weight, sign * STEP * gone):
                ends.append(losses(model, pool))
        slope = (ends[0] - ends[1]) / (2 * STEP)
        a = found.by_module[unit.name][:, 0]
        torch.testing.assert_close(a, slope, rtol=1e-3, atol=1e-6 * float(a.abs().max()))


def test_classical_scores_are_those_of_their_papers(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama", "float64")
    model, targets, pool = loaded(folder).model, targets_of(folder)[0], plain.encoded(folder)[1:2]
    (wanda,) = tile_units([targets[5]], SIDE, WandaTiles)
    layer = next(u for u in units_of(folder) if u.kind == Kind.LAYERS and u.layer == 1)
    assert isinstance(layer, Whole)
    block = decoder_blocks(model)[1][1]
    turning = TurningLayer(layer.name, layer.kind, 1, layer.sizes, layer.branches, block)
    found, _ = effects(model, [], {}, pool, Objective.BOTH, FLAT, units=[wanda, turning])
    seen: dict[str, Tensor] = {}
    handles = [
        targets[5].module.register_forward_pre_hook(lambda _, inputs: seen.update(X=inputs[0][0])),
        block.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0][0], y=output[0])),
    ]
    tokens = torch.tensor([[*pool[0].prompt, *pool[0].continuations[0][:-1]]])
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    scores = targets[5].weight.abs() * seen["X"].norm(dim=0)
    tiles = [scores[r : r + SIDE, c : c + SIDE].mean() for r in range(0, 48, SIDE) for c in range(0, 32, SIDE)]
    torch.testing.assert_close(found.by_module[wanda.name][0], torch.stack(tiles))
    cosines = (seen["x"] * seen["y"]).sum(1) / seen["x"].norm(dim=1) / seen["y"].norm(dim=1)
    torch.testing.assert_close(found.by_module[turning.name][0, 0], 1 - cosines.mean())
    heads = next(u for u in units_of(folder) if u.kind == Kind.HEADS)
    W = heads.targets[0].weight
    torch.testing.assert_close(heads.magnitudes()[2], W[:, 16:24].square().mean().sqrt())
    tile = tile_units([targets[5]], SIDE)[0]
    torch.testing.assert_close(tile.magnitudes()[-1], targets[5].weight[40:, 20:].square().mean().sqrt())


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


def drawn(unit: Unit, seed: int) -> tuple[int, ...]:
    """Some of a unit's structures: every third, or the one that there is."""
    return tuple(range(seed % unit.count, unit.count, 3))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES + MASKED)
def test_a_structure_that_is_removed_is_one_whose_gate_is_zero_and_all_is_undone_to_the_bit(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    model, pool = loaded(folder).model, pool_of(architecture, folder)
    units = units_of(folder)
    # One kind at a time over all layers, layers each by itself: a model without any predicts alike whatever is gone.
    plans: list[Indices] = [{u.name: drawn(u, k) for k, u in enumerate(units) if u.kind == kind} for kind in Kind]
    plans = [*plans[:-3], *({u.name: (0,)} for u in units if isinstance(u, Whole))]
    batch = next(batches(pool, FLAT))
    before = plain.weights_of(model)
    for structures in plans:
        with ExitStack() as stack, torch.no_grad():
            for unit in units:
                if unit.name in structures:
                    gates = torch.ones(unit.count, dtype=torch.float64)
                    gates[list(structures[unit.name])] = 0
                    stack.enter_context(gated(unit, gates))
            expected = answer_logits(model, batch)
        with applied([], {}, Plan({}, structures), units), torch.no_grad():
            found = answer_logits(model, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert bool(torch.isfinite(found).all())
        if structures:
            assert not torch.allclose(answer_logits(model, batch), found, rtol=0, atol=1e-6)
    after = plain.weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gptj", "gpt_neox", "gpt2", "phi3", "qwen3"])
def test_a_decoder_block_that_is_removed_hands_on_what_it_is_given(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    model, units = loaded(folder).model, units_of(folder)
    block = decoder_blocks(model)[1][1]
    seen: list[tuple[Tensor, Tensor]] = []

    def hear(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append((inputs[0], output[0] if isinstance(output, tuple) else output))

    handle = block.register_forward_hook(hear)
    (name,) = [unit.name for unit in units if unit.kind == Kind.LAYERS and unit.layer == 1]
    with applied([], {}, Plan({}, {name: (0,)}), units), torch.no_grad():
        answer_logits(model, next(batches(plain.encoded(folder), FLAT)))
    handle.remove()
    assert torch.equal(*seen[0])


EDITED = [
    ("llama", "float32"),
    ("llama", "bfloat16"),
    ("gpt2", "float32"),
    ("gpt_neox", "float32"),
    ("bert", "float32"),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("architecture", "dtype"), EDITED)
def test_a_plan_of_everything_is_what_adapter_and_model_hold_when_they_are_read_back(
    architecture: str, dtype: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models(architecture, dtype)
    base = load(folder)
    targets, _ = find_targets(base.model)
    spectra = {target.name: decompose(target.weight) for target in targets}
    found = find_units(base.model, targets, set(Kind))[0]
    units = [*found, *tile_units(targets, SIDE)]
    rounds: list[set[str]] = [{Kind.HEADS, Kind.NEURONS}, {Kind.GROUPS, Kind.MLP}, {f"blocks{SIDE}"}, {Kind.LAYERS}]
    for k, kinds in enumerate(rounds):
        structures = {u.name: drawn(u, u.layer) for u in units if u.kind in kinds and (u.layer == 1 or k < 1)}
        plan = Plan({targets[-1].name: (0, 2), targets[1].name: (1,)}, structures)
        out = tmp_path / str(k)
        write_adapter(out / "adapter", "m", targets, spectra, plan, units, masked=base.masked)
        write_model(out / "model", base, targets, spectra, plan, units)
        batch = next(batches(pool_of(architecture, folder), FLAT))
        with applied(targets, spectra, plan, units), torch.no_grad():
            expected = answer_logits(base.model, batch)
        assert not torch.allclose(answer_logits(base.model, batch), expected, rtol=0, atol=0.01)
        adapter, merged = reload_check(out, base, batch, expected)
        assert merged == 0
        assert adapter < (0.5 if dtype == "bfloat16" else 1e-3)
        stored = load_tensors((out / "adapter" / "adapter_model.safetensors").read_bytes())
        for target in targets:
            key = f"base_model.model.{target.name}.lora_"
            if f"{key}A.weight" in stored:
                factors = Factors(stored[f"{key}A.weight"], stored[f"{key}B.weight"])
                assert factors.A.shape[0] <= min(target.shape)
                # What `c2i apply` knows an adapter's own base by.
                assert factors.strangeness(target.weight) < (0.2 if dtype == "bfloat16" else 0.01)
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert config["lora_bias"] is (bool(kinds & {Kind.MLP, Kind.LAYERS}) and architecture != "llama")


def test_the_adapter_of_heads_and_neurons_has_a_rank_for_each_column_that_is_gone(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    targets, units = targets_of(folder)[0], units_of(folder)
    structures = {"model.layers.0.mlp:neurons": (3, 7), "model.layers.1.self_attn:heads": (2,)}
    found = updates(targets, {}, Plan({}, structures), units)
    ranks = {name: update.A.shape[0] for name, update in found.items()}
    assert ranks == {"model.layers.0.mlp.down_proj": 2, "model.layers.1.self_attn.o_proj": 8}
    W = next(t for t in targets if t.name == "model.layers.0.mlp.down_proj").weight
    update = found["model.layers.0.mlp.down_proj"]
    assert update.bias is None
    merged = W + update.B @ update.A
    assert torch.equal(merged[:, [3, 7]], torch.zeros(32, 2))
    assert torch.equal(merged[:, 8:], W[:, 8:])

"""Effects against three things that know nothing of hooks: a finite difference, dense gradients, the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from service.jobs import Objective
from tests import plain
from tests.plain import ARCHITECTURES, MIXTURES, encoded, loaded, nudged, targets_of, within_window
from workers.evaluation import evaluate, honours_tree_mask
from workers.examples import Encoded, Layout
from workers.gradients import effects
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import decompose
from workers.targets import Target, find_targets
from workers.truncation import RowBlock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def double() -> Iterator[None]:
    """For the length of a test, float64 models compute in float64 throughout."""
    with plain.double_throughout():
        yield


TinyModels = Callable[..., Path]
PACKED, FLAT = Layout(packed=True), Layout(packed=False)


def triple(target: Target, i: int) -> tuple[Tensor, float, Tensor]:
    """Component i of a weight by torch's SVD, which the product does not use: u (out,), s, v (in,)."""
    U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
    return U[:, i], float(S[i]), Vh[i]


def examples_for(folder: Path, layout: Layout) -> list[Encoded]:
    """Examples that the model takes in this layout."""
    examples = encoded(folder)
    if layout.packed:
        examples = within_window(folder, examples)
        assert any(len(c) > 1 for e in examples for c in e.continuations)
        assert any(e.closed for e in examples)
        assert honours_tree_mask(loaded(folder).model, examples)
    return examples


def by_module(folder: Path, objective: Objective = Objective.BOTH, layout: Layout = PACKED) -> dict[str, Tensor]:
    """Effects (N, rank) of every module of a model."""
    targets, spectra = targets_of(folder)
    found, unreached = effects(loaded(folder).model, targets, spectra, examples_for(folder, layout), objective, layout)
    assert not unreached
    return found.by_module


def close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Within 1e-3 of each value; values under a millionth of the largest are noise of both."""
    return bool(((found - expected).abs() <= 1e-3 * expected.abs() + 1e-6 * scale.abs().max()).all())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_an_effect_is_the_slope_of_each_examples_loss_along_its_singular_value(
    architecture: str, objective: Objective, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    found = by_module(folder, objective)
    model, examples = loaded(folder).model, examples_for(folder, PACKED)
    targets, _ = targets_of(folder)
    for target in targets:
        rank = min(target.weight.shape)
        a = found[target.name]
        assert a.shape == (len(examples), rank)
        for i in (0, rank // 2, rank - 1) if objective is Objective.BOTH else (min(1, rank - 1),):
            u, s, v = triple(target, i)
            step = 1e-4
            with nudged(target.weight, step * torch.outer(u, v)):
                up = evaluate(model, examples, objective, FLAT).loss
            with nudged(target.weight, -step * torch.outer(u, v)):
                down = evaluate(model, examples, objective, FLAT).loss
            slope = s * torch.from_numpy(up - down) / (2 * step)
            assert close(a[:, i], slope, a), f"{target.name}, component {i}: {a[:, i]} is not {slope}"


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("layout", [PACKED, FLAT], ids=["packed", "flat"])
@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_effects_are_the_diagonal_of_the_dense_gradients_of_unbatched_examples(
    architecture: str, layout: Layout, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    found = by_module(folder, layout=layout)
    model = loaded(folder).model
    targets, _ = targets_of(folder)
    parameters = [target.module.get_parameter("weight") for target in targets]
    for n, example in enumerate(examples_for(folder, layout)):
        gradients = torch.autograd.grad(plain.loss(model, example, Objective.BOTH), parameters)
        for target, gradient in zip(targets, gradients, strict=True):
            G = gradient.T if target.transposed else gradient
            U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
            dense = S * torch.diagonal(U.T @ G @ Vh.T)
            torch.testing.assert_close(found[target.name][n], dense, rtol=1e-6, atol=1e-8 * float(dense.abs().max()))
            # All components together are the weight itself.
            torch.testing.assert_close(found[target.name][n].sum(), (target.weight * G).sum(), rtol=1e-6, atol=1e-8)


@contextmanager
def holding(folder: Path, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
    """The model with another's weights, rounded to its own type."""
    model = loaded(folder).model
    original = plain.weights_of(model)
    model.load_state_dict(weights)
    try:
        yield model
    finally:
        model.load_state_dict(original)


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_single_precision_and_batches_of_one_give_the_same_effects(architecture: str, tiny_models: TinyModels) -> None:
    wide, narrow = tiny_models(architecture, "float64"), tiny_models(architecture, "float32")
    with plain.double_throughout():
        expected, examples = by_module(wide), examples_for(wide, PACKED)
    targets, _ = targets_of(narrow)
    with holding(narrow, plain.weights_of(loaded(wide).model)) as model:
        found, _ = effects(model, targets, targets_of(wide)[1], examples, Objective.BOTH, Layout(packed=True, tokens=1))
    for name, a in found.by_module.items():
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), expected[name], rtol=1e-2, atol=1e-4 * float(expected[name].abs().max()))


def test_sixteen_bit_effects_are_those_of_the_same_weights_in_double_precision(tiny_models: TinyModels) -> None:
    wide, half = tiny_models("llama", "float64"), tiny_models("llama", "bfloat16")
    found = by_module(half)
    spectra = targets_of(half)[1]
    with holding(wide, plain.weights_of(loaded(half).model)) as model:
        expected, _ = effects(model, targets_of(wide)[0], spectra, encoded(wide), Objective.BOTH, PACKED)
    for name, a in found.items():
        assert a.dtype == torch.float32
        pair = torch.stack([a.double().flatten(), expected.by_module[name].double().flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.98, name


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_removing_small_components_changes_each_loss_by_minus_their_effects(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    model, examples = loaded(folder).model, encoded(folder)
    for target in targets_of(folder)[0]:
        whole = decompose(target.weight)
        B, A = whole.factors(target.weight, (whole.rank - 2, whole.rank - 1))
        # The last two at a thousandth of their size: removing them is so small a step that first order is all.
        with nudged(target.weight, -0.999 * B @ A):
            spectra = {target.name: decompose(target.weight)}
            found, _ = effects(model, [target], spectra, examples, Objective.BOTH, PACKED)
            before = evaluate(model, examples, Objective.BOTH, PACKED).loss
            with applied([target], spectra, Plan({target.name: (whole.rank - 2, whole.rank - 1)})):
                change = torch.from_numpy(evaluate(model, examples, Objective.BOTH, PACKED).loss - before)
        predicted = -found.by_module[target.name][:, -2:].sum(1)
        torch.testing.assert_close(change, predicted, rtol=1e-2, atol=1e-2 * float(predicted.abs().max()))


# Blocks with more rows than columns and with fewer, of weights with biases and without, transposed and not.
ROW_BLOCKS = [
    ("llama", "1.mlp.gate_proj", slice(4, 44)),
    ("llama", "0.mlp.down_proj", slice(3, 20)),
    ("llama", "0.self_attn.v_proj", torch.tensor([0, 3, 9, 15])),
    ("qwen2", "1.self_attn.q_proj", slice(8, 16)),
    ("gpt2", "0.mlp.c_fc", slice(64, 128)),
    ("gpt2", "1.mlp.c_proj", torch.tensor([1, 2, 30])),
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("architecture", "name", "index"), ROW_BLOCKS, ids=str)
def test_an_effect_in_a_row_block_is_the_slope_along_the_singular_value_of_those_rows_alone(
    architecture: str, name: str, index: slice | Tensor, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    model, examples = loaded(folder).model, examples_for(folder, PACKED)
    whole = next(t for t in targets_of(folder)[0] if t.name.endswith(name))
    block = replace(whole, rows=RowBlock("some", index))
    spectra = {block.name: decompose(block.weight)}
    found, unreached = effects(model, [block], spectra, examples, Objective.BOTH, PACKED)
    assert not unreached
    a = found.by_module[block.name]
    assert a.shape == (len(examples), min(block.shape))
    for i in (0, min(block.shape) // 2, min(block.shape) - 1):
        u, s, v = triple(block, i)
        change = torch.zeros_like(whole.weight)
        change[index] = 1e-4 * torch.outer(u, v)
        with nudged(whole.weight, change):
            up = evaluate(model, examples, Objective.BOTH, FLAT).loss
        with nudged(whole.weight, -change):
            down = evaluate(model, examples, Objective.BOTH, FLAT).loss
        slope = s * torch.from_numpy(up - down) / 2e-4
        assert close(a[:, i], slope, a), f"component {i}: {a[:, i]} is not {slope}"


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("architecture", "name"), [("llama", "1.mlp.up_proj"), ("gpt2", "0.attn.c_attn")])
def test_the_effects_of_all_blocks_of_a_weight_sum_to_those_of_the_whole(
    architecture: str, name: str, tiny_models: TinyModels
) -> None:
    # Removing every component of either is removing the weight.
    folder = tiny_models(architecture, "float64")
    whole = next(t for t in targets_of(folder)[0] if t.name.endswith(name))
    targets = [whole, *whole.split(3), *whole.cluster(2, seed=0)]
    spectra = {target.name: decompose(target.weight) for target in targets}
    found, _ = effects(loaded(folder).model, targets, spectra, encoded(folder), Objective.BOTH, PACKED)
    sums = [found.by_module[target.name].sum(1) for target in targets]
    torch.testing.assert_close(sum(sums[1:4]), sums[0])
    torch.testing.assert_close(sum(sums[4:]), sums[0])


@pytest.mark.parametrize(("architecture", "blocks"), [("olmo", 1), ("olmo", 4), ("ctrl", 1), ("ctrl", 4)])
def test_a_model_may_change_in_place_what_a_module_gives_it(
    architecture: str, blocks: int, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    model, examples = loaded(folder).model, encoded(folder)
    targets, _ = targets_of(folder)
    parts = {target.name: target.split(blocks) for target in targets}
    split = [part for each in parts.values() for part in each]
    spectra = {part.name: decompose(part.weight) for part in split}
    found, unreached = effects(model, split, spectra, examples, Objective.BOTH, FLAT)
    assert not unreached
    parameters = [target.module.get_parameter("weight") for target in targets]
    for n, example in enumerate(examples):
        gradients = torch.autograd.grad(plain.loss(model, example, Objective.BOTH), parameters)
        for target, parameter, gradient in zip(targets, parameters, gradients, strict=True):
            together = sum(float(found.by_module[part.name][n].sum()) for part in parts[target.name])
            whole = float((parameter.detach() * gradient).sum())
            assert together == pytest.approx(whole, rel=1e-3, abs=1e-4), target.name


@pytest.mark.usefixtures("double")
def test_after_a_pass_the_removed_components_have_no_effect_and_the_others_that_on_the_changed_model(
    tiny_models: TinyModels,
) -> None:
    folder = tiny_models("llama", "float64")
    model, examples = loaded(folder).model, encoded(folder)
    targets, spectra = targets_of(folder)
    down = next(t for t in targets if t.name.endswith("1.mlp.down_proj"))
    up = next(t for t in targets if t.name.endswith("1.mlp.up_proj"))
    triples = {t.name: torch.linalg.svd(t.weight, full_matrices=False) for t in (down, up)}
    with applied(targets, spectra, Plan({down.name: (0, 3), up.name: (1, 5)})):
        found, _ = effects(model, targets, spectra, examples, Objective.BOTH, PACKED)
        loss = plain.loss(model, examples[0], Objective.BOTH)
        gradients = torch.autograd.grad(loss, [t.module.get_parameter("weight") for t in (down, up)])
    for target, gone, G in zip((down, up), ([0, 3], [1, 5]), gradients, strict=True):
        a = found.by_module[target.name]
        assert a[:, gone].abs().max() < 1e-10 * a.abs().max()
        U, S, Vh = triples[target.name]
        expected = S * torch.diagonal(U.T @ G @ Vh.T)
        expected[gone] = 0
        torch.testing.assert_close(a[0], expected, rtol=1e-6, atol=1e-9)


def test_the_losses_of_the_pass_are_those_of_an_evaluation(tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen2", "float64")
    targets, spectra = targets_of(folder)
    for objective in Objective:
        found, _ = effects(loaded(folder).model, targets, spectra, encoded(folder), objective, PACKED)
        expected = evaluate(loaded(folder).model, encoded(folder), objective, PACKED).loss
        torch.testing.assert_close(found.loss, torch.from_numpy(expected))


def test_a_pass_reports_its_progress_and_leaves_no_hook_gradient_or_flag_behind(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama", "float64")
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(flags.values())
    told: list[float] = []
    effects(
        model, targets, spectra, encoded(folder), Objective.BOTH, Layout(packed=True, tokens=1), on_batch=told.append
    )
    assert told == pytest.approx([k / 6 for k in range(1, 7)])

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        effects(model, targets, spectra, encoded(folder), Objective.BOTH, PACKED, on_batch=stop)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_the_forward_does_not_call_is_named_and_has_no_effects(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama", "float64")
    targets, spectra = targets_of(folder)
    idle = Target("idle", torch.nn.Linear(4, 4, dtype=torch.float64), transposed=False)
    found, unreached = effects(
        loaded(folder).model,
        [*targets, idle],
        {**spectra, "idle": decompose(idle.weight)},
        encoded(folder),
        Objective.BOTH,
        PACKED,
    )
    assert unreached == {"idle": "the forward pass does not call it"}
    assert set(found.by_module) == set(spectra)


class Experts(nn.Module):
    """Two experts that each take half of the tokens of all rows, as one batch: whose they are is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        out[::2] = self.first(tokens[::2])
        out[1::2] = self.second(tokens[1::2])
        return out.view_as(x)


class Flat(nn.Module):
    """A layer over all tokens of all rows in their order: they can be told apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.every = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.every(x.flatten(0, 1)).view_as(x)
        return out


class Regrouping(nn.Module):
    """No model of transformers has experts that are Linear modules today; older ones had."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(400, 8), nn.Linear(8, 400)
        self.layers = nn.ModuleList([Flat(), Experts(), Flat()])

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.head(x))


def test_modules_whose_tokens_are_regrouped_are_named_and_the_others_attributed() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Regrouping().double()
    examples = [Encoded((3, 4, 5), ((6, 7),), 0, ("a",)), Encoded((8, 9, 10), ((11, 12),), 0, ("b",))]
    targets, _ = find_targets(model)
    spectra = {target.name: decompose(target.weight) for target in targets}
    found, unreached = effects(model, targets, spectra, examples, Objective.BOTH, FLAT)
    why = "its tokens are regrouped and cannot be attributed to examples"
    assert unreached == {"layers.1.first": why, "layers.1.second": why}
    for target in targets:
        if target.name in found.by_module:
            G = target.module.get_parameter("weight")
            for n, example in enumerate(examples):
                tokens = torch.tensor([[*example.prompt, *example.continuations[0][:-1]]])
                logits = model(tokens, tokens, False).logits[0, -2:].log_softmax(-1)
                loss = -logits[[0, 1], list(example.continuations[0])].sum()
                (gradient,) = torch.autograd.grad(loss, [G])
                expected = (target.weight * gradient).sum()
                torch.testing.assert_close(found.by_module[target.name][n].sum(), expected)

"""Models in 16 bits: their effects, the weights they are shipped with, and what the rounding of these costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from service import models
from service.jobs import Example, JobSpec, Objective
from service.reports import Report
from tests import plain, tiny
from tests.plain import loaded, targets_of
from tests.planted import Planted
from workers.adaptation import adapt
from workers.evaluation import evaluate
from workers.examples import Layout
from workers.gradients import effects
from workers.loading import load
from workers.ranking import Plan, t_scores
from workers.rounding import applied_unrounded
from workers.targets import find_targets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_module_without_rounding_gives_what_its_weight_in_float32_gives(
    architecture: str, dtype: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, dtype)
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    chosen = {target.name: (0, 2, 5) for target in targets[1::2]}
    before = plain.weights_of(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with applied_unrounded(targets, spectra, Plan(chosen)):
        handles = [
            target.module.register_forward_hook(
                lambda module, inputs, output, name=target.name: seen.update({name: (inputs[0], output)})
            )
            for target in targets
        ]
        evaluate(model, plain.encoded(folder), Objective.BOTH, Layout(packed=True))
    for handle in handles:
        handle.remove()
    for target in targets:
        if target.name not in chosen:
            continue
        U, S, Vh = torch.linalg.svd(target.weight.double(), full_matrices=False)
        S[list(chosen[target.name])] = 0
        x, output = seen[target.name]
        expected = functional.linear(x.double(), U * S @ Vh, None if target.bias is None else target.bias.double())
        assert output.dtype == getattr(torch, dtype)
        # The output's own rounding is the only one: a weight in 16 bits would bring several times that.
        half_a_step = 0.51 * torch.finfo(output.dtype).eps
        torch.testing.assert_close(
            output.double(), expected, rtol=half_a_step, atol=1e-5 * float(expected.abs().max()), msg=target.name
        )
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.95), ("float16", 0.999)])
def test_components_rank_in_sixteen_bits_as_they_do_with_the_same_weights_in_single_precision(
    dtype: str, least: float, tiny_models: TinyModels
) -> None:
    folder = tiny_models("qwen2", dtype)
    wide: Any = load(folder).model.float()
    examples = plain.encoded(folder, [Example.model_validate(row) for row in tiny.learnable_examples(32)])
    targets, spectra = targets_of(folder)
    layout = Layout(packed=True)
    found, _ = effects(loaded(folder).model, targets, spectra, examples, Objective.BOTH, layout)
    expected, _ = effects(wide, find_targets(wide)[0], spectra, examples, Objective.BOTH, layout)
    assert {a.dtype for a in found.by_module.values()} == {found.loss.dtype} == {torch.float32}
    t, t_wide = (torch.cat([t_scores(a) for a in e.by_module.values()]) for e in (found, expected))
    assert stats.spearmanr(t, t_wide).statistic > least


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model in 16 bits."""
    folder = tmp_path_factory.mktemp("half") / str(request.param)
    model: Any = load(planted.folder).model
    model.to(getattr(torch, request.param)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def adapted(folder: Path, planted: Planted, out: Path) -> Report:
    rows = [example.model_dump() for example in planted.examples]
    spec = JobSpec.parse({"model": folder.name, "examples": rows[:80], "test": rows[80:]})
    model = models.resolve(folder.parent, folder.name)
    return adapt(spec, model, out, cache=out / "cache", on_progress=lambda *step: None)


def test_an_adaptation_in_sixteen_bits_ships_sixteen_bits_and_says_what_the_rounding_costs(
    half: Path, planted: Planted, tmp_path: Path
) -> None:
    report = adapted(half, planted, tmp_path)
    dtype = getattr(torch, half.name)
    assert report.improved
    assert report.model.dtype == half.name
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(tmp_path / file).values()} == {dtype}
    # The same two losses again: of the model on disk, and of one whose pruned modules compute in float32.
    test = plain.encoded(planted.folder, planted.examples[80:])
    shipped = loaded(tmp_path / "model").model
    unrounded: Any = load(half).model
    for entry in report.plan:
        linear = unrounded.get_submodule(entry.module)
        U, S, Vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        S[entry.components] = 0
        parent, _, name = entry.module.rpartition(".")
        setattr(unrounded.get_submodule(parent), name, Wide((U * S @ Vh).float(), linear.bias))
    layout = Layout(packed=True)
    losses = [evaluate(model, test, Objective.BOTH, layout).loss.mean() for model in (shipped, unrounded)]
    assert report.adapted.loss == pytest.approx(losses[0], abs=1e-6)
    assert report.rounding_loss == pytest.approx(losses[0] - losses[1], abs=1e-4)
    assert abs(losses[0] - losses[1]) < 0.1 * (report.base.loss - report.adapted.loss)


class Wide(nn.Module):
    """A Linear in float32 between activations in 16 bits."""

    def __init__(self, W: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.linear = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
        self.linear.weight.data = W
        if bias is not None:
            self.linear.bias.data = bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.float()).to(x.dtype)
        return out


def test_in_single_precision_no_cost_of_rounding_is_reported(planted: Planted, tmp_path: Path) -> None:
    assert adapted(planted.folder, planted, tmp_path).rounding_loss is None

"""Which weights are targets, and that what cannot be one is named or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.errors import UnusableModel
from tests.plain import ARCHITECTURES, loaded
from workers.targets import decoder_blocks, find_targets

TinyModels = Callable[..., Path]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_of_the_blocks_is_a_target_and_no_other(architecture: str, tiny_models: TinyModels) -> None:
    model = loaded(tiny_models(architecture)).model
    targets, skipped = find_targets(model)
    assert not skipped
    prefix, blocks = decoder_blocks(model)
    assert len(blocks) == 2
    expected = [f"{prefix}.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert [target.name for target in targets] == expected
    # Counted another way: all matrices of the model but embeddings and the head.
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    outside = {name for name in matrices if any(part in name for part in ("embed", "wte", "wpe", "lm_head"))}
    assert {f"{target.name}.weight" for target in targets} == matrices - outside
    for target in targets:
        assert model.get_submodule(target.name) is target.module


def test_a_weight_is_a_view_of_out_by_in_and_never_a_copy(tiny_models: TinyModels) -> None:
    for architecture, name, shape in (
        ("gpt2", "transformer.h.0.mlp.c_fc", (128, 32)),
        ("llama", "model.layers.0.mlp.down_proj", (32, 48)),
    ):
        model = loaded(tiny_models(architecture)).model
        target = next(t for t in find_targets(model)[0] if t.name == name)
        assert target.weight.shape == shape
        x = torch.randn(3, shape[1])
        y = x @ target.weight.T + (0 if target.bias is None else target.bias)
        torch.testing.assert_close(target.module(x), y)
        before = target.weight[1, 2].clone()
        target.weight[1, 2] += 1
        try:
            assert not torch.allclose(target.module(x), y)
        finally:
            target.weight[1, 2] = before


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_fused_experts_and_routers_are_skipped_and_named(architecture: str, tiny_models: TinyModels) -> None:
    targets, skipped = find_targets(loaded(tiny_models(architecture)).model)
    names = [skip.module for skip in skipped]
    assert [name for name in names if name.endswith("experts")] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]
    assert all("neither Linear nor Conv1D" in skip.reason for skip in skipped)
    assert "gate_up_proj (4, " in next(skip.reason for skip in skipped if skip.module.endswith("experts"))
    assert not set(names) & {target.name for target in targets}
    assert any(target.name.endswith("q_proj") for target in targets)


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)


def model_of(*blocks: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(4, 9)})


def test_a_weight_that_two_modules_share_is_skipped_in_both() -> None:
    first, second = Block(), Block()
    second.one.weight = first.one.weight
    targets, skipped = find_targets(model_of(first, second))
    assert [target.name for target in targets] == ["layers.0.two", "layers.1.two"]
    assert [(skip.module, skip.reason) for skip in skipped] == [
        ("layers.0.one", "it shares its weight with another module"),
        ("layers.1.one", "it shares its weight with another module"),
    ]


def test_a_weight_shared_with_the_head_is_skipped_too() -> None:
    block = Block()
    model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(4, 4)})
    model["head"].weight = block.one.weight
    assert [skip.module for skip in find_targets(model)[1]] == ["layers.0.one"]


def test_the_largest_list_of_modules_holds_the_blocks() -> None:
    model = nn.ModuleDict(
        {"tower": nn.ModuleList([nn.Linear(2, 2) for _ in range(9)]), "layers": nn.ModuleList([Block(8)])}
    )
    assert decoder_blocks(model)[0] == "layers"


def test_a_model_without_blocks_or_without_matrices_is_refused() -> None:
    with pytest.raises(UnusableModel, match="no list of blocks") as refused:
        find_targets(nn.Linear(2, 2))
    assert refused.value.param == "model"
    with pytest.raises(UnusableModel, match="no Linear or Conv1D"):
        find_targets(model_of(nn.LayerNorm(4)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_wherever_they_are(value: float) -> None:
    for name in ("layers.0.one.weight", "layers.1.two.bias", "head.weight"):
        model = model_of(Block(), Block())
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(UnusableModel, match=f"{name} holds NaN or infinite"):
            find_targets(model)

"""The attentions and MLPs of a model's blocks: what each adds to the residual stream, and by which projections.

What a module is to its block cannot be seen from shapes alone: a query projection is as square as an output
projection. So modules are known by the names that transformers gives them, and taken for what they are called only if
their shapes agree with each other and with the configuration. What is not known, or disagrees, is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from service.reports import SkippedModule
from workers.targets import Target, decoder_blocks


class Part(StrEnum):
    """Of a decoder block."""

    ATTENTION = "attention"
    MLP = "mlp"


# A module's inputs and output by their names in it, the gated MLPs before the plain ones.
_PATTERNS: tuple[tuple[Part, tuple[str, ...], str], ...] = (
    *((Part.ATTENTION, ("q_proj", "k_proj", "v_proj"), output) for output in ("o_proj", "out_proj", "dense")),
    (Part.ATTENTION, ("qkv_proj",), "o_proj"),
    (Part.ATTENTION, ("c_attn",), "c_proj"),
    (Part.ATTENTION, ("query_key_value",), "dense"),
    (Part.ATTENTION, ("Wqkv",), "Wo"),
    (Part.ATTENTION, ("self.query", "self.key", "self.value"), "output.dense"),
    (Part.ATTENTION, ("self.query_proj", "self.key_proj", "self.value_proj"), "output.dense"),
    (Part.ATTENTION, ("query", "key", "value"), "dense"),
    (Part.ATTENTION, ("q_lin", "k_lin", "v_lin"), "out_lin"),
    (Part.MLP, ("gate_proj", "up_proj"), "down_proj"),
    (Part.MLP, ("gate_up_proj",), "down_proj"),
    (Part.MLP, ("up_proj",), "down_proj"),
    (Part.MLP, ("c_fc",), "c_proj"),
    (Part.MLP, ("fc_in",), "fc_out"),
    (Part.MLP, ("fc1",), "fc2"),
    (Part.MLP, ("dense_h_to_4h",), "dense_4h_to_h"),
    (Part.MLP, ("Wi",), "Wo"),
    (Part.MLP, ("intermediate.dense",), "output.dense"),
    (Part.MLP, ("ffn",), "ffn_output"),
    (Part.MLP, ("lin1",), "lin2"),
)
# Norms before a branch, behind the sum with the residual stream, or on queries and keys: none changes what a branch is.
_HARMLESS_NORMS = {
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "ln_1", "ln_2", "attn_norm", "mlp_norm",
    "q_norm", "k_norm", "sa_layer_norm", "output_layer_norm", "LayerNorm", "full_layer_layer_norm",
    "self_attn_layer_norm", "final_layer_norm",
}  # fmt: skip
# Where a block has the second of these names, it norms what each branch adds, by the first and by the second.
_NORMS_BEHIND = {Part.ATTENTION: "post_attention_layernorm", Part.MLP: "post_feedforward_layernorm"}


@dataclass(frozen=True, eq=False)
class Branch:
    """An attention or an MLP: projections in, something between them, one projection out."""

    part: Part
    place: str
    """The module's name, `model.layers.3.mlp`."""
    layer: int
    inputs: tuple[Target, ...]
    output: Target
    end: nn.Module
    """The module whose output is added to the residual stream: the output projection, or a norm behind it."""
    width: int
    """Neurons, or the size of a head."""
    count: int
    """Of neurons or query heads."""
    group: int = 1
    """Query heads that share keys and values."""

    @property
    def parameters(self) -> int:
        """Of all its projections."""
        return sum(parameters_of(target) for target in (*self.inputs, self.output))


def find_branches(model: nn.Module, targets: Sequence[Target]) -> tuple[list[Branch], list[SkippedModule]]:
    """The attentions and MLPs of the model's blocks, and what could not be taken for one.

    Args:
        targets: whole weights, as `find_targets` gives them.
    """
    prefix, blocks = decoder_blocks(model)
    by_name = {target.name: target for target in targets}
    heads = _head_counts(model)
    branches: list[Branch] = []
    skipped: list[SkippedModule] = []
    for layer, block in enumerate(blocks):
        name = f"{prefix}.{layer}"
        strange = _strange_norms(block)
        if strange:
            skipped.append(SkippedModule(module=name, reason=f"what {strange[0]} does in its block is not known"))
            continue
        found: set[Part] = set()
        for part, place, inputs, output in _matches(name, block, by_name):
            end = _end(block, part) or output.module
            branch = _checked(part, place, layer, inputs, output, end, heads)
            if isinstance(branch, str):
                skipped.append(SkippedModule(module=place, reason=branch))
            else:
                branches.append(branch)
            found.add(part)
        for missing in sorted({Part.ATTENTION, Part.MLP} - found):
            skipped.append(SkippedModule(module=name, reason=f"no projections of its {missing} are known by name"))
    return branches, skipped


def _matches(
    name: str, block: nn.Module, by_name: dict[str, Target]
) -> Iterator[tuple[Part, str, tuple[Target, ...], Target]]:
    """Modules of a block that hold projections in and out by known names: part, place, in, out."""
    for parent, _ in block.named_modules(prefix=name):
        for part, inputs, output in _PATTERNS:
            if all(f"{parent}.{child}" in by_name for child in (*inputs, output)):
                place = parent if parent != name else f"{parent}.{output.split('.')[0]}"
                yield (
                    part,
                    place,
                    tuple(by_name[f"{parent}.{child}"] for child in inputs),
                    by_name[f"{parent}.{output}"],
                )
                break


def _checked(
    part: Part,
    place: str,
    layer: int,
    inputs: tuple[Target, ...],
    output: Target,
    end: nn.Module,
    heads: tuple[int, int] | None,
) -> Branch | str:
    """The branch if all shapes agree, or why they do not."""
    inner = output.shape[1]
    outs = [target.shape[0] for target in inputs]
    if end is not output.module and any(name != "weight" for name, _ in end.named_parameters()):
        return f"the norm behind its {part} gives more than nothing for nothing"
    if part is Part.MLP:
        gated = len(inputs) == 1 and outs == [2 * inner]
        if not gated and set(outs) != {inner}:
            return f"what its MLP reads, {inner}, is not what its projections give, {outs}"
        return Branch(part, place, layer, inputs, output, end, width=1, count=inner)
    if heads is None:
        return "its attention has heads that the configuration does not count"
    H, K = heads
    d = inner // H
    expected = [H * d, K * d, K * d] if len(inputs) == 3 else [(H + 2 * K) * d]
    if inner % H or H % K or outs != expected:
        return f"its attention has projections of {outs}; {H} heads over {inner} and {K} of keys need {expected}"
    return Branch(part, place, layer, inputs, output, end, width=d, count=H, group=H // K)


def _head_counts(model: nn.Module) -> tuple[int, int] | None:
    """Query heads and heads of keys and values of every attention, if the configuration says so."""
    config: Any = model.config
    config = config.get_text_config()
    H = getattr(config, "num_attention_heads", None)
    K = getattr(config, "num_key_value_heads", None) or H
    return (H, K) if isinstance(H, int) and isinstance(K, int) and H > 0 < K else None


def _strange_norms(block: nn.Module) -> list[str]:
    """Modules with vectors for parameters whose place in the block is not known."""
    known = _HARMLESS_NORMS | set(_NORMS_BEHIND.values())
    found = []
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        if own and all(p.ndim < 2 for p in own) and name.rpartition(".")[2] not in known:
            found.append(name)
    return found


def _end(block: nn.Module, part: Part) -> nn.Module | None:
    """The norm behind a branch, if the block has such."""
    if not isinstance(getattr(block, _NORMS_BEHIND[Part.MLP], None), nn.Module):
        return None
    found = getattr(block, _NORMS_BEHIND[part], None)
    return found if isinstance(found, nn.Module) else None


def parameters_of(target: Target) -> int:
    """Numbers in the weight and the bias."""
    return target.whole_weight.numel() + (target.bias.numel() if target.bias is not None else 0)

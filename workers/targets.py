"""Which weights of a model are targets: every `nn.Linear` and GPT-2 `Conv1D` inside its decoder blocks, or inside
the encoder blocks of a masked language model.

Embeddings and the LM head are never targets, a head's dense layer neither. What lies inside the blocks and cannot be
handled (fused expert tensors, a weight that two modules share) is named, not silently passed over.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.errors import UnusableModel
from service.reports import SkippedModule
from workers.truncation import RowBlock, clustered_blocks, contiguous_blocks


@dataclass(frozen=True, eq=False)
class Target:
    """One weight matrix, or a block of its rows, that components can be removed from."""

    module_name: str
    """Its name in the model, `model.layers.3.mlp.up_proj`."""
    module: nn.Module
    transposed: bool
    """Whether the module stores (in, out), as `Conv1D` does."""
    layer: int = 0
    """The index of the decoder block that it lies in."""
    kind: str = ""
    """The module's name within its block, `mlp.up_proj`."""
    rows: RowBlock | None = None
    """The output rows that are meant; None for all."""

    @property
    def name(self) -> str:
        """The module's name, with the rows where they are not all: `model.layers.3.mlp.up_proj[0:192]`."""
        return self.module_name if self.rows is None else f"{self.module_name}[{self.rows.label}]"

    @property
    def shape(self) -> tuple[int, int]:
        """Of `weight`."""
        out, in_ = self.whole_weight.shape
        return (out if self.rows is None else self.rows.size), in_

    @property
    def whole_weight(self) -> Tensor:
        """The module's weight as (out, in): the parameter itself or a transposed view of it, never a copy."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if self.transposed else weight

    @property
    def weight(self) -> Tensor:
        """The target's rows of `whole_weight`: a view of them, but for clustered rows, which are copied."""
        return self.whole_weight if self.rows is None else self.whole_weight[self.rows.index]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the target's rows, if there is one."""
        bias = self.module.bias
        if not isinstance(bias, Tensor):
            return None
        return bias.detach() if self.rows is None else bias.detach()[self.rows.index]

    def split(self, blocks: int) -> list[Target]:
        """The target as so many targets of neighbouring rows; itself where that is one."""
        if blocks == 1:
            return [self]
        return [replace(self, rows=block) for block in contiguous_blocks(self.weight.shape[0], blocks)]

    def cluster(self, blocks: int, seed: int) -> list[Target]:
        """The target as so many targets of similar rows, by k-means; itself where that is one."""
        if blocks == 1:
            return [self]
        return [replace(self, rows=block) for block in clustered_blocks(self.weight, blocks, seed)]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The module list that holds most of the weights: the decoder blocks, whatever the architecture calls them, or a
    masked language model's encoder blocks.

    Raises:
        UnusableModel: if the model has no module list at all.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnusableModel("the model has no list of blocks; a transformer is needed", param="model")
    return max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))


def find_targets(model: nn.Module) -> tuple[list[Target], list[SkippedModule]]:
    """All targets in the model's order, and what had to be skipped.

    Raises:
        UnusableModel: if there is not a single target, or a weight of the model is not finite.
    """
    prefix, blocks = decoder_blocks(model)
    uses = Counter(id(p) for _, m in model.named_modules() for p in m.parameters(recurse=False))
    targets: list[Target] = []
    skipped: list[SkippedModule] = []
    for name, module in blocks.named_modules(prefix=prefix):
        matrices = {k: p for k, p in module.named_parameters(recurse=False) if p.ndim >= 2}
        if not matrices:
            continue
        reason = None
        if not isinstance(module, nn.Linear | Conv1D):
            kinds = ", ".join(f"{k} {tuple(p.shape)}" for k, p in matrices.items())
            reason = f"{type(module).__name__} is neither Linear nor Conv1D ({kinds})"
        elif not module.weight.is_floating_point() or module.weight.ndim != 2:
            reason = f"its weight is {module.weight.dtype} of shape {tuple(module.weight.shape)}"
        elif uses[id(module.weight)] > 1:
            reason = "it shares its weight with another module"
        if reason is None:
            layer, _, kind = name.removeprefix(f"{prefix}.").partition(".")
            targets.append(Target(name, module, isinstance(module, Conv1D), int(layer), kind))
        else:
            skipped.append(SkippedModule(module=name, reason=reason))
    if not targets:
        raise UnusableModel("no Linear or Conv1D weight was found in the model's blocks", param="model")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach()).all()):
            raise UnusableModel(f"{name} holds NaN or infinite weights", param="model")
    return targets, skipped

"""What turns the gradients of a backward pass into effects: hooks on modules, one recorder for each weight or unit.

A structure's gate g multiplies what it hands on. With value V (tokens, width) and gradient D of the same place,
`dL_n/dg = sum_t V[t] . D[t]` over the entries that the gate is on (METHOD 3; Michel, Levy, Neubig, arXiv 1905.10650,
take the mean of its absolute value). Removing the structure changes L_n by minus that, to first order:

- a neuron, a head: its entries of what the projection behind it reads;
- a sub-layer: what it adds to the residual stream; a layer: the sum over its sub-layers, each of which has the gate;
- a tile of a weight W, with X what the weight reads and D the gradient of what it gives:
  `sum_{i, j in the tile} W[i, j] sum_t D[t, i] X[t, j]`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workers.spectrum import Spectrum
from workers.structures import Columns, Pattern, Tiles, TurningLayer, Unit, WandaTiles, Whole
from workers.targets import Target


class Recorder(ABC):
    """Adds up the effects of some components or structures as gradients come through."""

    def __init__(self, name: str, effect: Tensor) -> None:
        self.name = name
        self.effect = effect  # (N, n), added to in place
        self.rows = torch.empty(0)  # (R,) the example of each row of the batch under way
        self.tokens = 0  # T of the batch under way
        self.called = False
        self.reached = False
        self.unattributable = False
        self.seconds = 0.0

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Hook what is to be heard."""

    @abstractmethod
    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        """(R, n): what one call of a module adds.

        Args:
            value, gradient: (R, T, width), of what was tapped; in float32 or wider.
        """

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Add what one call of a module contributes.

        Args:
            value, gradient: (R, T, width) or (R T, width), each of its own width.
        """
        if self.unattributable:
            return
        started = time.perf_counter()
        self.reached = True
        R, dtype = self.rows.numel(), wide_enough(value)
        wide = (tensor.to(dtype).reshape(R, -1, tensor.shape[-1]) for tensor in (value, gradient))
        self.effect.index_add_(0, self.rows, self.contribution(*wide).to(self.effect.dtype))
        self.seconds += time.perf_counter() - started

    def tap_input(self, module: nn.Module) -> RemovableHandle:
        """Hear what a module reads, and its gradient."""

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._note_call(inputs[0])
            return (_Tap.apply(inputs[0], inputs[0], self), *inputs[1:])  # type: ignore[no-untyped-call]

        return module.register_forward_pre_hook(hook)

    def tap_output(self, module: nn.Module, *, with_input: bool = False) -> RemovableHandle:
        """Hear the gradient of what a module gives, with that itself, or with what the module reads."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            self._note_call(inputs[0])
            value = inputs[0].detach() if with_input else output
            tapped: Tensor = _Tap.apply(output, value, self)  # type: ignore[no-untyped-call]
            return tapped.clone()  # a model may change it in place (OLMo clips queries), which is allowed of no view

        return module.register_forward_hook(hook)

    def _note_call(self, X: Tensor) -> None:
        """Tokens may be regrouped, by experts say, and no longer belong to rows; DeBERTa projects embeddings of
        distances by the same module, to which no gradient goes, and they would be missed."""
        self.called = True
        R, T = self.rows.numel(), self.tokens
        self.unattributable |= X.shape[:-1] not in ((R, T), (R * T,))


class ComponentRecorder(Recorder):
    """The singular components of one target."""

    def __init__(self, target: Target, spectrum: Spectrum, N: int, dtype: torch.dtype) -> None:
        super().__init__(target.name, spectrum.S.new_zeros(N, spectrum.rank, dtype=dtype))
        self.target = target
        self.bias = target.bias
        self.spectrum = spectrum

    def attach(self) -> list[RemovableHandle]:
        """Hook the side of the module that the components' basis is of; the output for a row block, since what the
        module sends back is the gradient of all rows."""
        if self.spectrum.side == "in" and self.target.rows is None:
            return [self.tap_input(self.target.module)]
        return [self.tap_output(self.target.module, with_input=self.spectrum.side == "in")]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        rows = self.target.rows
        if rows is not None:
            gradient = gradient[..., rows.index]
            if self.spectrum.side == "in":
                gradient = gradient @ self.target.weight.to(gradient.dtype)
            else:
                value = value[..., rows.index]
        if self.spectrum.side == "out" and self.bias is not None:
            value = value - self.bias
        basis = self.spectrum.basis.to(value.dtype)
        return ((gradient @ basis) * (value @ basis)).sum(1)


class ColumnsRecorder(Recorder):
    """Heads or neurons: entries of what a projection reads."""

    def __init__(self, unit: Columns, N: int, dtype: torch.dtype) -> None:
        super().__init__(unit.name, unit.branch.output.whole_weight.new_zeros(N, unit.count, dtype=dtype))
        self.unit = unit

    def attach(self) -> list[RemovableHandle]:
        return [self.tap_input(self.unit.branch.output.module)]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        return (value * gradient).sum(1).reshape(-1, self.unit.count, self.unit.width).sum(-1)


class WholeRecorder(Recorder):
    """A sub-layer or layer: what its branches add to the residual stream."""

    def __init__(self, unit: Whole, N: int, dtype: torch.dtype) -> None:
        super().__init__(unit.name, unit.targets[0].whole_weight.new_zeros(N, 1, dtype=dtype))
        self.unit = unit

    def attach(self) -> list[RemovableHandle]:
        return [self.tap_output(branch.end) for branch in self.unit.branches]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        return (value * gradient).sum((1, 2))[:, None]


class TilesRecorder(Recorder):
    """The tiles of one weight: one column of them after the other, so that no product is larger than an output."""

    def __init__(self, unit: Tiles, N: int, dtype: torch.dtype) -> None:
        super().__init__(unit.name, unit.target.whole_weight.new_zeros(N, unit.count, dtype=dtype))
        self.unit = unit

    def attach(self) -> list[RemovableHandle]:
        return [self.tap_output(self.unit.target.module, with_input=True)]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        W = self.unit.target.whole_weight.to(value.dtype)
        side, (out, in_) = self.unit.side, W.shape
        padding = -out % side
        effects = []
        for at in range(0, in_, side):
            columns = slice(at, at + side)
            of_rows = ((value[..., columns] @ W[:, columns].T) * gradient).sum(1)  # (R, out)
            padded = nn.functional.pad(of_rows, (0, padding))
            effects.append(padded.reshape(len(padded), -1, side).sum(-1))
        return torch.stack(effects, -1).flatten(1)


class PatternRecorder(Recorder):
    """The entries of one weight that a pattern takes."""

    def __init__(self, unit: Pattern, N: int, dtype: torch.dtype) -> None:
        super().__init__(unit.name, unit.target.whole_weight.new_zeros(N, 1, dtype=dtype))
        self.unit = unit

    def attach(self) -> list[RemovableHandle]:
        return [self.tap_output(self.unit.target.module, with_input=True)]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        gone = torch.where(self.unit.mask, self.unit.target.whole_weight, 0).to(value.dtype)
        return ((value @ gone.T) * gradient).sum((1, 2))[:, None]


class WandaRecorder(TilesRecorder):
    """Not an effect, but a score of tiles to compare with: |W| times the norm of what each entry is multiplied by
    (Sun et al., arXiv 2306.11695), a tile's mean. Here the norms are over the tokens of each example."""

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        norms = value.norm(dim=1)  # (R, in)
        W = self.unit.target.whole_weight.to(value.dtype).abs()
        return torch.stack([self.unit.sums(W * row) for row in norms]) / self.unit.sizes.to(W.device)


class BlockInfluenceRecorder(Recorder):
    """Not an effect, but a score of layers to compare with: 1 minus the cosine of what a block is given and what it
    hands on, over an example's tokens (Men et al., arXiv 2403.03853)."""

    def __init__(self, unit: Whole, N: int, dtype: torch.dtype, block: nn.Module) -> None:
        super().__init__(unit.name, unit.targets[0].whole_weight.new_zeros(N, 1, dtype=dtype))
        self.block = block

    def attach(self) -> list[RemovableHandle]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._note_call(inputs[0])
            self.add(inputs[0].detach(), (output if isinstance(output, Tensor) else output[0]).detach())

        return [self.block.register_forward_hook(hook)]

    def contribution(self, value: Tensor, gradient: Tensor) -> Tensor:
        return (1 - nn.functional.cosine_similarity(value, gradient, dim=-1)).mean(1)[:, None]


RECORDERS: dict[type[Unit], Callable[[Any, int, torch.dtype], Recorder]] = {
    Columns: ColumnsRecorder,
    Whole: WholeRecorder,
    Tiles: TilesRecorder,
    Pattern: PatternRecorder,
    WandaTiles: WandaRecorder,
    TurningLayer: lambda unit, N, dtype: BlockInfluenceRecorder(unit, N, dtype, unit.block),
}


def recorder_of(unit: Unit, N: int, dtype: torch.dtype) -> Recorder:
    """What records the effects of a unit's structures on N examples."""
    return RECORDERS[type(unit)](unit, N, dtype)


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows a recorder the gradient together with a value of the forward.

    Autograd itself keeps the value from the forward to the backward: so it is freed as soon as it is used, and is
    not kept at all but computed again where a block is checkpointed.
    """

    @staticmethod
    def forward(ctx: Any, through: Tensor, value: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(value)
        ctx.recorder = recorder
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        ctx.recorder.add(value, gradients[0])
        return gradients[0], None, None


def wide_enough(tensor: Tensor) -> torch.dtype:
    """The dtype that effects of such a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

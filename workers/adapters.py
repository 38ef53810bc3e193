"""A plan as an adapter: for each module that it touches, a low-rank difference that is exactly what is removed.

Components J are `B A` with B (out, j) and A (j, in): a LoRA of rank |J| that subtracts. Entries that become zero are
one too: where they lie in c columns, `-W[:, c]` beside c rows of the identity; where in fewer rows, the other way
round. A difference of no low rank is written as it is, beside an identity of the smaller side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.pruning import cleared, pruned
from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to one module."""

    A: Tensor
    """(r, in)"""
    B: Tensor
    """(out, r): `W + B A` is the weight without what is removed."""
    bias: Tensor | None
    """(out,) that makes the module's bias zero; None where it stays."""


def updates(
    targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan, units: Sequence[Unit] = ()
) -> dict[str, Update]:
    """For each module that the plan touches what is added to it, in the weight's dtype."""
    blocks: dict[str, list[Target]] = {}
    for target in targets:
        if plan.components.get(target.name):
            blocks.setdefault(target.module_name, []).append(target)
    structures: dict[str, list[tuple[Unit, tuple[int, ...], Target]]] = {}
    for unit, indices, target in cleared(plan, units):
        structures.setdefault(target.module_name, []).append((unit, indices, target))
    found = {}
    for name in dict.fromkeys([*blocks, *structures]):
        own = blocks.get(name, [])
        factors = [module_factors(own, spectra, plan)] if own else []
        bias = None
        if name in structures:
            target = structures[name][0][2]
            W = target.whole_weight.clone()
            for block in own:
                index = slice(None) if block.rows is None else block.rows.index
                W[index] = pruned(block.weight, spectra[block.name], plan.components[block.name])
            left = W.clone()
            for unit, indices, _ in structures[name]:
                unit.clear(left, indices)
                if unit.whole and target.bias is not None:
                    bias = -target.bias
            factors.append(_of_support(left - W))
        A, B = _smallest(torch.cat([A for A, _ in factors]), torch.cat([B for _, B in factors], 1))
        found[name] = Update(A, B, bias)
    return found


def _of_support(difference: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a matrix (out, in) by the columns or the rows that are not zero, whichever are fewer."""
    columns, rows = (difference.any(side).nonzero().squeeze(1) for side in (0, 1))
    out, in_ = difference.shape
    if len(columns) <= len(rows):
        return _rows_of_identity(columns, in_, difference), difference[:, columns].contiguous()
    return difference[rows].contiguous(), _rows_of_identity(rows, out, difference).T.contiguous()


def _rows_of_identity(which: Tensor, size: int, like: Tensor) -> Tensor:
    """(k, size)"""
    chosen = like.new_zeros(len(which), size)
    chosen[torch.arange(len(which), device=like.device), which] = 1
    return chosen


def _smallest(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with no more ranks than its smaller side."""
    out, in_ = B.shape[0], A.shape[1]
    if A.shape[0] <= min(out, in_):
        return A, B
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    difference = (B.to(wide) @ A.to(wide)).to(A.dtype)
    if in_ <= out:
        return torch.eye(in_, dtype=A.dtype, device=A.device), difference
    return difference, torch.eye(out, dtype=A.dtype, device=A.device)


def lora_factors(W: Tensor, spectrum: Spectrum, components: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The removal as PEFT stores it.

    Returns:
        lora_A (j, in) and lora_B (out, j) with `W + lora_B @ lora_A` the pruned weight, in W's dtype.
    """
    B, A = spectrum.factors(W, components)
    return A.to(W.dtype).contiguous(), (-B).to(W.dtype).contiguous()


def module_factors(blocks: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan) -> tuple[Tensor, Tensor]:
    """The removal of one module's components, of whichever of its row blocks, as PEFT stores it.

    Args:
        blocks: the module's targets that the plan touches, at least one.

    Returns:
        lora_A (j, in) and lora_B (out, j), in the weight's dtype; j is the number of components, or the smaller side
        of the weight where that is less.
    """
    whole = blocks[0].whole_weight
    factors = [lora_factors(t.weight, spectra[t.name], plan.components[t.name]) for t in blocks]
    A = torch.cat([A for A, _ in factors])
    B = whole.new_zeros(whole.shape[0], A.shape[0])
    at = 0
    for target, (_, part) in zip(blocks, factors, strict=True):
        columns = slice(at, at + part.shape[1])
        if target.rows is None:
            B[:, columns] = part
        else:
            rows = B[:, columns]
            rows[target.rows.index] = part
        at = columns.stop
    return _smallest(A, B)

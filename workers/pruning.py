"""Applying a plan to a model and undoing it, and the plan as an exact low-rank adapter.

Removing components J of a weight is `W - sum_j s_j u_j v_j^T = W + B A` with B (out, j) and A (j, in): a LoRA of
rank |J| that subtracts. A plan is always applied to the base weights, in one step, and undone by putting the base
weights back, so the weights come back to the bit and do not depend on what was tried before.

A plan may edit several row blocks of one weight. They have no row in common: each is pruned as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.targets import Target


@contextmanager
def applied(targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan) -> Iterator[None]:
    """The model with the plan's components removed, for the length of the context. Contexts do not nest: a plan
    is meant for the base weights.

    The base weights are laid aside, not overwritten: undoing costs nothing. Memory: a second tensor for each weight
    that the plan touches.
    """
    laid_aside: dict[str, tuple[nn.Parameter, Tensor]] = {}
    try:
        for target in targets:
            components = plan.components.get(target.name)
            if not components:
                continue
            parameter = target.module.get_parameter("weight")
            new = pruned(target.weight, spectra[target.name], components)
            first = target.module_name not in laid_aside
            laid_aside.setdefault(target.module_name, (parameter, parameter.data))
            if target.rows is None:
                parameter.data = new.T.contiguous() if target.transposed else new
            else:
                if first:
                    parameter.data = parameter.data.clone()
                target.whole_weight[target.rows.index] = new
        yield
    finally:
        for parameter, base in laid_aside.values():
            parameter.data = base


def pruned(W: Tensor, spectrum: Spectrum, components: Sequence[int]) -> Tensor:
    """W (out, in) without the components, in W's dtype; the difference is taken in float32 or wider."""
    B, A = spectrum.factors(W, components)
    return torch.addmm(W.to(B.dtype), B, A, alpha=-1).to(W.dtype)


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
    if A.shape[0] <= min(whole.shape):
        return A, B
    # Blocks can lose more components together than the weight has: the difference itself is the smaller form.
    wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
    difference = (B.to(wide) @ A.to(wide)).to(whole.dtype)
    out, in_ = whole.shape
    if in_ <= out:
        return torch.eye(in_, dtype=whole.dtype, device=whole.device), difference
    return difference, torch.eye(out, dtype=whole.dtype, device=whole.device)

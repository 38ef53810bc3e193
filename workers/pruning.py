"""Applying a plan to a model and undoing it, and the plan as an exact low-rank adapter.

Removing components J of a weight is `W - sum_j s_j u_j v_j^T = W + B A` with B (out, j) and A (j, in): a LoRA of
rank |J| that subtracts. A plan is always applied to the base weights, in one step, and undone by putting the base
weights back, so the weights come back to the bit and do not depend on what was tried before.
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
    laid_aside: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for target in targets:
            components = plan.components.get(target.name)
            if components:
                parameter = target.module.get_parameter("weight")
                new = pruned(target.weight, spectra[target.name], components)
                laid_aside.append((parameter, parameter.data))
                parameter.data = new.T.contiguous() if target.transposed else new
        yield
    finally:
        for parameter, base in laid_aside:
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

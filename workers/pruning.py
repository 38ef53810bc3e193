"""Applying a plan to a model and undoing it, and the plan as an exact low-rank adapter.

Removing components J of a weight is `W - sum_j s_j u_j v_j^T = W + B A` with B (out, j) and A (j, in): a LoRA of
rank |J| that subtracts. A plan is always applied to the base weights, in one step, and undone by putting the base
weights back, so the weights come back to the bit and do not depend on what was tried before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.targets import Target


@contextmanager
def applied(targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan) -> Iterator[None]:
    """The model with the plan's components removed, for the length of the context. Contexts do not nest: a plan
    is meant for the base weights.

    Memory: a copy of each weight that the plan touches.
    """
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for target in targets:
            components = plan.components.get(target.name)
            if components:
                weight = target.weight
                originals.append((weight, weight.clone()))
                weight.copy_(pruned(weight, spectra[target.name], components))
        yield
    finally:
        for weight, original in originals:
            weight.copy_(original)


def pruned(W: Tensor, spectrum: Spectrum, components: Sequence[int]) -> Tensor:
    """W (out, in) without the components, in W's dtype; the difference is taken in float32 or wider."""
    B, A = spectrum.factors(W, components)
    return (W.to(B.dtype) - B @ A).to(W.dtype)


def lora_factors(W: Tensor, spectrum: Spectrum, components: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The removal as PEFT stores it.

    Returns:
        lora_A (j, in) and lora_B (out, j) with `W + lora_B @ lora_A` the pruned weight, in W's dtype.
    """
    B, A = spectrum.factors(W, components)
    return A.to(W.dtype).contiguous(), (-B).to(W.dtype).contiguous()

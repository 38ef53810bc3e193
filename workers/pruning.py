"""Applying a plan to a model and undoing it.

Removing components J of a weight is `W - sum_j s_j u_j v_j^T`; removing structures sets entries of what is then left
to zero, and the bias too where a whole branch goes (`workers.structures`). A plan is always applied to the base
weights, in one step, and undone by putting the base weights back, so the weights come back to the bit and do not depend
on what was tried before.

A plan may edit several row blocks of one weight. They have no row in common: each is pruned as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target


@contextmanager
def applied(
    targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan, units: Sequence[Unit] = ()
) -> Iterator[None]:
    """The model with the plan's components and structures removed, for the length of the context. Contexts do not
    nest: a plan is meant for the base weights.

    The base weights are laid aside, not overwritten: undoing costs nothing. Memory: a second tensor for each weight
    that the plan touches.
    """
    laid_aside: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def lay_aside(parameter: nn.Parameter) -> bool:
        """Whether it was not before."""
        known = id(parameter) in laid_aside
        laid_aside.setdefault(id(parameter), (parameter, parameter.data))
        return not known

    try:
        for target in targets:
            components = plan.components.get(target.name)
            if not components:
                continue
            parameter = target.module.get_parameter("weight")
            new = pruned(target.weight, spectra[target.name], components)
            first = lay_aside(parameter)
            if target.rows is None:
                parameter.data = new.T.contiguous() if target.transposed else new
            else:
                if first:
                    parameter.data = parameter.data.clone()
                target.whole_weight[target.rows.index] = new
        for unit, indices, target in cleared(plan, units):
            for parameter in zeroed(unit, target):
                if lay_aside(parameter):
                    parameter.data = parameter.data.clone()
            clear(unit, indices, target)
        yield
    finally:
        for parameter, base in laid_aside.values():
            parameter.data = base


def cleared(plan: Plan, units: Sequence[Unit]) -> Iterator[tuple[Unit, tuple[int, ...], Target]]:
    """The weights that lose entries, each with the unit and the structures that it loses them by."""
    for unit in units:
        indices = plan.structures.get(unit.name)
        if indices:
            for target in unit.targets:
                yield unit, indices, target


def zeroed(unit: Unit, target: Target) -> list[nn.Parameter]:
    """What removing structures of the unit writes zeros into: the weight, and of a whole branch the bias."""
    names = ["weight", "bias"] if unit.whole and target.bias is not None else ["weight"]
    return [target.module.get_parameter(name) for name in names]


def clear(unit: Unit, indices: Sequence[int], target: Target) -> None:
    """Write the zeros, in place."""
    unit.clear(target.whole_weight, indices)
    if unit.whole and target.bias is not None:
        target.bias.zero_()


def pruned(W: Tensor, spectrum: Spectrum, components: Sequence[int]) -> Tensor:
    """W (out, in) without the components, in W's dtype; the difference is taken in float32 or wider."""
    B, A = spectrum.factors(W, components)
    return torch.addmm(W.to(B.dtype), B, A, alpha=-1).to(W.dtype)

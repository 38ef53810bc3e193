"""What it costs a model in 16 bits that its pruned weights are rounded to 16 bits.

A pruned weight is computed in float32 and shipped in the base's dtype. Its rounding is noise on every entry of the
weight, beside which a few small components may look small: so it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from workers.pruning import cleared, pruned
from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target


@contextmanager
def applied_unrounded(
    targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan, units: Sequence[Unit] = ()
) -> Iterator[None]:
    """The model with the plan's components and structures removed, the weights it touches in float32, for the length
    of the context: inputs and outputs of their modules stay in the model's dtype. The model's own weights are the
    base's.

    Memory: twice that of each weight that the plan touches.
    """
    wide: dict[str, tuple[nn.Module, Tensor]] = {}
    without_bias: set[str] = set()

    def widened(target: Target) -> Tensor:
        return wide.setdefault(target.module_name, (target.module, target.whole_weight.float().clone()))[1]

    for target in targets:
        components = plan.components.get(target.name)
        if components:
            new = pruned(target.weight.float(), spectra[target.name], components)
            widened(target)[slice(None) if target.rows is None else target.rows.index] = new
    for unit, indices, target in cleared(plan, units):
        unit.clear(widened(target), indices)
        if unit.whole:
            without_bias.add(target.module_name)
    with ExitStack() as stack:
        for name, (module, W) in wide.items():
            bias = module.bias.detach() if isinstance(module.bias, Tensor) and name not in without_bias else None
            stack.callback(module.register_forward_hook(_product(W, bias)).remove)
        yield


def _product(W: Tensor, bias: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook whose output is that of W (out, in), float32, in the dtype of the module's own."""
    wide_bias = None if bias is None else bias.float()

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return functional.linear(inputs[0].float(), W, wide_bias).to(output.dtype)

    return hook

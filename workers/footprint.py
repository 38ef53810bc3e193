"""How large the checkpoint is that a plan leaves: numbers and bytes, before anything is written.

Only structures count. A layer takes its norms with it, and what else of the plan was in it goes with it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from service.goals import Measure
from workers.ranking import Plan
from workers.structures import Kind, Unit
from workers.targets import Target, decoder_blocks


@dataclass(frozen=True, eq=False)
class Footprint:
    """Of one base model and the structures that may go."""

    parameters: int
    """Numbers in the base checkpoint."""
    bytes: int
    """Of its weight files."""
    number_bytes: int
    """Of a weight in a block."""
    units: Sequence[Unit]
    layer_numbers: dict[int, int]
    """Of each block, all that is in it."""

    @classmethod
    def of(cls, model: nn.Module, units: Sequence[Unit], *, parameters: int, bytes: int) -> Footprint:
        """Of a model in memory and its files.

        Args:
            parameters, bytes: of the checkpoint.
        """
        blocks = decoder_blocks(model)[1]
        layers = {k: sum(p.numel() for p in block.parameters()) for k, block in enumerate(blocks)}
        return cls(parameters, bytes, next(model.parameters()).dtype.itemsize, units, layers)

    def numbers_gone(self, plan: Plan) -> int:
        """Numbers that the checkpoint can be without."""
        gone = gone_layers(plan, self.units)
        total = sum(self.layer_numbers[layer] for layer in gone)
        for unit in self.units:
            indices = plan.structures.get(unit.name)
            if indices and unit.layer not in gone:
                total += int(unit.sizes[list(indices)].sum())
        return total

    def fraction(self, plan: Plan, measure: Measure = "parameters") -> float:
        """What is left, as a fraction of the base's."""
        if measure == "bytes":
            return self.bytes_left(plan) / self.bytes
        return 1 - self.numbers_gone(plan) / self.parameters

    def bytes_left(self, plan: Plan) -> int:
        """Bytes of the weight files."""
        return self.bytes - self.numbers_gone(plan) * self.number_bytes


def gone_layers(plan: Plan, units: Sequence[Unit]) -> set[int]:
    """The layers that a plan removes whole."""
    return {unit.layer for unit in units if unit.kind == Kind.LAYERS and plan.structures.get(unit.name)}


def tidied(plan: Plan, targets: Sequence[Target], units: Sequence[Unit]) -> Plan:
    """The plan without what lies in layers that it removes whole."""
    gone = gone_layers(plan, units)
    idle = {target.name for target in targets if target.layer in gone}
    idle |= {unit.name for unit in units if unit.layer in gone and unit.kind != Kind.LAYERS}
    return Plan(
        {name: own for name, own in plan.components.items() if name not in idle},
        {name: own for name, own in plan.structures.items() if name not in idle},
    )

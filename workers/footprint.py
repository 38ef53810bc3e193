"""How large the checkpoint is that a plan leaves: numbers and bytes, before anything is written.

Only what can be cut off the files counts (`workers.shrinking`): heads that no configuration can be without stand as
zeros and save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from service.goals import Measure
from service.jobs import Quantize
from workers.loading import Checkpoint
from workers.quantizing import quantized_part
from workers.ranking import Plan
from workers.shrinking import Anatomy, examine, layer_of, parameters_left
from workers.structures import Kind, Tiles, Unit
from workers.targets import Target

# Of a quantized number, a little more than its bits for the scales that go with it.
QUANTIZED_BYTES = {Quantize.INT8: 1.01, Quantize.INT4: 0.53}


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
    anatomy: Anatomy
    quantize: Quantize | None = None
    """Bytes are counted after that."""
    quantized_part: float = 1.0
    """Of the numbers in blocks, those that it takes."""

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        units: Sequence[Unit],
        *,
        parameters: int,
        bytes: int,
        quantize: Quantize | None = None,
    ) -> Footprint:
        """Of a model in memory, whose weights are its own, and its files.

        Args:
            parameters, bytes: of the checkpoint.
        """
        part = quantized_part(base.model, quantize) if quantize else 1.0
        return cls(parameters, bytes, base.dtype.itemsize, units, examine(base), quantize, part)

    @cached_property
    def _whole(self) -> int:
        return parameters_left(self.anatomy, Plan(), self.units)

    @property
    def tiled(self) -> bool:
        """Whether what goes is tiles, which are zeros in any file."""
        return any(isinstance(unit, Tiles) for unit in self.units)

    def numbers_gone(self, plan: Plan) -> int:
        """Numbers that the checkpoint is without; tiles count as gone."""
        if self.tiled:
            return sum(int(unit.sizes[list(plan.structures.get(unit.name, ()))].sum()) for unit in self.units)
        return self._whole - parameters_left(self.anatomy, plan, self.units)

    def fraction(self, plan: Plan, measure: Measure = "parameters") -> float:
        """What is left, as a fraction of the base's."""
        if measure == "bytes":
            return self.bytes_left(plan) / self.bytes
        return 1 - self.numbers_gone(plan) / self.parameters

    def bytes_left(self, plan: Plan) -> float:
        """Bytes of the weight files, of the quantized ones where those are wanted: what is not quantized then has 16
        bits, embeddings and head say, and in blocks a number has the mean of what they have there."""
        gone = self.numbers_gone(plan)
        if self.quantize is None:
            return self.bytes - gone * self.number_bytes
        in_blocks = sum(prod(s) for n, s in self.anatomy.shapes.items() if layer_of(n, self.anatomy.prefix) is not None)
        outside = sum(map(prod, self.anatomy.shapes.values())) - in_blocks
        whole = min(self.number_bytes, 2)
        each = self.quantized_part * QUANTIZED_BYTES[self.quantize] + (1 - self.quantized_part) * whole
        return (in_blocks - gone) * each + outside * whole


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

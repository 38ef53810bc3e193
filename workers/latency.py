"""How small a model must be to decode as fast as `decode_latency` asks: measured, not reckoned.

Between the base and a model without some structures of the strategy's kind the time of a token is taken to fall by as
much for every number that goes. So one measurement of the two gives the size that is aimed at; before the last round
it is taken again with what is gone by then.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from service.errors import InvalidInput
from workers.checkpoints import write_model
from workers.footprint import Footprint
from workers.loading import Checkpoint
from workers.ranking import Plan, plan_of
from workers.speed import measure
from workers.structures import Unit
from workers.targets import Target

# Below this a number that goes saves next to nothing, and what was measured is noise.
LEAST_SLOPE = 0.05


class Latency:
    """Of one base model."""

    def __init__(
        self, base: Checkpoint, targets: Sequence[Target], units: Sequence[Unit], footprint: Footprint, scratch: Path
    ) -> None:
        """
        Args:
            scratch: a folder that is made, and removed, for each measurement.

        Raises:
            InvalidInput: the model decodes nothing.
        """
        if base.masked:
            raise InvalidInput(
                "a masked language model decodes nothing; its target is `parameters` or `bytes`", param="target"
            )
        self._base, self._targets, self._units, self._footprint = base, targets, units, footprint
        self._scratch = scratch

    def size_for(self, fraction: float, plan: Plan, least: float) -> float:
        """The fraction of the parameters with which a token takes a fraction of the base's time.

        Args:
            plan: of structures that are gone; the base and this are measured.
            least: the smallest fraction of the parameters that can be reached.

        Raises:
            InvalidInput: it is beyond that, or nothing becomes faster.
        """
        gone = 1 - self._footprint.fraction(plan)
        slope = (1 - self._time_of(plan)) / gone if gone > 0 else 0.0
        if slope < LEAST_SLOPE:
            raise InvalidInput(
                "on this worker the model decodes no faster without such structures; `layers` makes it faster, or aim "
                "at `parameters`",
                param="target",
            )
        size = 1 - (1 - fraction) / slope
        if size < least:
            reached = 1 - slope * (1 - least)
            raise InvalidInput(
                f"with this model and strategy decode_latency can fall to about {reached:.2f} of the base's, as "
                f"measured on this worker, not to {fraction:g}",
                param="target",
            )
        return size

    def _time_of(self, plan: Plan) -> float:
        """Of a token, as a fraction of the base's."""
        structures = Plan(structures=plan.structures)
        try:
            write_model(self._scratch, self._base, self._targets, {}, structures, self._units)
            base, smaller = measure([self._base.folder, self._scratch])
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if base.decode_tokens_per_second is None or smaller.decode_tokens_per_second is None:
            return 1.0
        return base.decode_tokens_per_second / smaller.decode_tokens_per_second


def probe(most: Plan) -> Plan:
    """Half of the layers that may go, so that a model is measured that is clearly faster; all of other structures, of
    which not every number can be left."""
    layers = {name: own for name, own in most.structures.items() if name.endswith(":all")}
    if not layers:
        return most
    return plan_of(dict(list(layers.items())[: -(-len(layers) // 2)]))

"""What a search is of: the model with what can be removed from it, and the ways through its examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from service.jobs import Objective
from workers.examples import Layout
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import Spectrum, decompose
from workers.structures import Unit
from workers.targets import Target


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under adaptation with what does not change: its targets and their components."""

    model: nn.Module
    targets: Sequence[Target]
    spectra: Mapping[str, Spectrum]
    objective: Objective
    layout: Layout
    decompose: Callable[[Tensor], Spectrum] = decompose
    """How more weights are decomposed, row blocks say: from a cache, where there is one."""
    units: Sequence[Unit] = ()
    """Structures beside components."""

    def without(self, plan: Plan) -> AbstractContextManager[None]:
        """The model with what the plan removes gone, for the length of the context."""
        return applied(self.targets, self.spectra, plan, self.units)

    def with_targets(self, more: Sequence[Target]) -> Subject:
        """The same model with more targets, decomposed."""
        new = [target for target in more if target.name not in self.spectra]
        spectra = {target.name: self.decompose(target.weight) for target in new}
        return replace(self, targets=[*self.targets, *new], spectra={**self.spectra, **spectra})

    @property
    def dtype(self) -> str:
        """`float32`, as configurations spell it."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


@dataclass
class Track:
    """One way through the passes. Rows are indices into the pool of encoded examples."""

    fit: list[int]
    judge: list[int]
    plan: Plan = field(default_factory=Plan)

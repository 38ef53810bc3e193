"""What a plan takes from a model's blocks, and how much of that can be cut off: whole layers, neurons, heads.

transformers builds every block of a model alike. So a width can only be lowered by what every block can spare, and a
layer can only go where nothing of it is left. Which neurons or heads go may differ from block to block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workers.branches import Branch, Part
from workers.ranking import Plan
from workers.structures import Columns, Unit, Whole
from workers.targets import Target


@dataclass(frozen=True)
class Lost:
    """What a plan takes from one branch."""

    indices: frozenset[int] = frozenset()
    """Its neurons or query heads."""
    whole: bool = False
    """Whether nothing of it reaches the residual stream any more."""


@dataclass(frozen=True)
class Cut:
    """What is left of the blocks. The mappings are by the names of the branches' output projections."""

    layers: tuple[int, ...]
    neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Query heads; `groups` are the heads of their keys and values."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int | None, int | None, int | None]:
        """How many neurons, query heads and groups every block is left with; None where that is unchanged."""
        counts = [next((len(kept) for kept in each.values()), None) for each in (self.neurons, self.heads, self.groups)]
        return counts[0], counts[1], counts[2]


def losses(branches: Iterable[Branch], plan: Plan, units: Iterable[Unit]) -> dict[str, Lost]:
    """What each branch loses, by the name of its output projection; tiles and patterns take entries, no structures."""
    taken: dict[str, set[int]] = {}
    whole: set[str] = set()
    for unit in units:
        indices = plan.structures.get(unit.name)
        if indices and isinstance(unit, Whole):
            whole |= {branch.output.module_name for branch in unit.branches}
        elif indices and isinstance(unit, Columns):
            each = unit.width // unit.branch.width
            own = taken.setdefault(unit.branch.output.module_name, set())
            own |= {index * each + k for index in indices for k in range(each)}
    found: dict[str, Lost] = {}
    for branch in branches:
        name = branch.output.module_name
        everything = name in whole
        own = set(range(branch.count)) if everything else taken.get(name, set())
        # Without its neurons or heads a projection still adds its bias.
        found[name] = Lost(frozenset(own), everything or (len(own) == branch.count and branch.output.bias is None))
    return found


def spare_neurons(branches: Sequence[Branch], lost: Mapping[str, Lost]) -> int:
    """How many neurons every MLP can spare, one being left."""
    return min((min(len(lost[b.output.module_name].indices), b.count - 1) for b in branches), default=0)


def without_neurons(cut: Cut, branches: Sequence[Branch], lost: Mapping[str, Lost], n: int) -> Cut:
    """The cut with n neurons less in every MLP, the first of those that it loses."""
    kept = {b.output.module_name: _without_first(b.count, lost[b.output.module_name].indices, n) for b in branches}
    return replace(cut, neurons=kept)


def spare_groups(branches: Sequence[Branch], lost: Mapping[str, Lost]) -> int:
    """How many key-value groups every attention can spare with their query heads, one being left."""
    return min((min(len(_lost_groups(b, lost)), b.count // b.group - 1) for b in branches), default=0)


def without_heads(cut: Cut, branches: Sequence[Branch], lost: Mapping[str, Lost], n: int) -> Cut:
    """The cut with n groups less in every attention, and of the groups that are left as many query heads less as each
    can spare, one being left."""
    groups: dict[str, tuple[int, ...]] = {}
    gone: dict[str, list[frozenset[int]]] = {}
    spare = min((branch.group for branch in branches), default=1) - 1
    for branch in branches:
        name = branch.output.module_name
        groups[name] = _without_first(branch.count // branch.group, _lost_groups(branch, lost), n)
        gone[name] = [lost[name].indices & _heads_of(branch, group) for group in groups[name]]
        spare = min(spare, *map(len, gone[name]))
    heads = {
        b.output.module_name: tuple(
            head
            for group, own in zip(groups[b.output.module_name], gone[b.output.module_name], strict=True)
            for head in sorted(_heads_of(b, group) - frozenset(sorted(own)[:spare]))
        )
        for b in branches
    }
    if not n and not spare:
        return cut
    return replace(cut, heads=heads, groups=groups)


def _heads_of(branch: Branch, group: int) -> frozenset[int]:
    return frozenset(range(group * branch.group, (group + 1) * branch.group))


def _lost_groups(branch: Branch, lost: Mapping[str, Lost]) -> frozenset[int]:
    own = lost[branch.output.module_name].indices
    return frozenset(g for g in range(branch.count // branch.group) if _heads_of(branch, g) <= own)


def _without_first(count: int, lost: Iterable[int], n: int) -> tuple[int, ...]:
    gone = set(sorted(lost)[:n])
    return tuple(k for k in range(count) if k not in gone)


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a stored tensor that is kept."""

    side: int
    index: Tensor
    """(n,) int64, ascending."""

    def of(self, stored: Tensor) -> Tensor:
        """A copy of what is kept."""
        return stored.index_select(self.side, self.index)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of what is kept of a tensor of this shape."""
        return (*whole[: self.side], self.index.numel(), *whole[self.side + 1 :])


def slices(cut: Cut, branches: Iterable[Branch]) -> dict[str, Slice]:
    """For each parameter that gets smaller, by its name in the model, what is kept of it."""
    found: dict[str, Slice] = {}
    for branch in branches:
        name = branch.output.module_name
        kept = cut.neurons.get(name) if branch.part is Part.MLP else cut.heads.get(name)
        if kept is None:
            continue
        columns = _spread(kept, branch.width)
        found[f"{name}.weight"] = Slice(0 if branch.output.transposed else 1, columns)
        for target, rows in zip(branch.inputs, _rows(branch, kept, cut.groups.get(name, ())), strict=True):
            found[f"{target.module_name}.weight"] = Slice(1 if target.transposed else 0, rows)
            if target.bias is not None:
                found[f"{target.module_name}.bias"] = Slice(0, rows)
    return found


def _rows(branch: Branch, kept: Sequence[int], groups: Sequence[int]) -> list[Tensor]:
    """(n,) of each input projection the rows that are kept. What is fused lies one behind the other: gate and up;
    queries, keys and values."""
    own = _spread(kept, branch.width)
    if branch.part is Part.MLP:
        fused = branch.inputs[0].shape[0] // branch.count
        return [own] * len(branch.inputs) if fused == 1 else [torch.cat([own, own + branch.count])]
    theirs = _spread(groups, branch.width)
    if len(branch.inputs) == 3:
        return [own, theirs, theirs]
    H, K = branch.count * branch.width, branch.count // branch.group * branch.width
    return [torch.cat([own, H + theirs, H + K + theirs])]


def _spread(kept: Sequence[int], width: int) -> Tensor:
    return (torch.tensor(kept, dtype=torch.int64)[:, None] * width + torch.arange(width)).flatten()


def useless(plan: Plan, units: Sequence[Unit], branches: Sequence[Branch]) -> int:
    """How many numbers are of no use once a plan's structures are gone, each counted once however many it is in."""
    lost = losses(branches, plan, units)
    masks: dict[str, Tensor] = {}
    total = 0
    for branch in branches:
        own = lost[branch.output.module_name]
        if own.whole:
            total += branch.parameters
        elif own.indices:
            total += _useless_of(branch, own, masks)
    whole = {t.module_name for b in branches if lost[b.output.module_name].whole for t in (*b.inputs, b.output)}
    for unit in units:
        indices = plan.structures.get(unit.name)
        if indices and not isinstance(unit, Whole | Columns):
            for target in unit.targets:
                if target.module_name not in whole:
                    unit.clear(_mask_of(target, masks), indices)
    return total + sum(int((mask == 0).sum()) for mask in masks.values())


def _useless_of(branch: Branch, own: Lost, masks: dict[str, Tensor]) -> int:
    """Mark the entries in the masks; of biases the number."""
    kept = tuple(sorted(set(range(branch.count)) - own.indices))
    groups = tuple(sorted({head // branch.group for head in kept}))
    biases = 0
    _mask_of(branch.output, masks)[:, _others(branch.output.shape[1], _spread(kept, branch.width))] = 0
    for target, rows in zip(branch.inputs, _rows(branch, kept, groups), strict=True):
        gone = _others(target.shape[0], rows)
        _mask_of(target, masks)[gone] = 0
        biases += len(gone) if target.bias is not None else 0
    return biases


def _mask_of(target: Target, masks: dict[str, Tensor]) -> Tensor:
    """(out, in) uint8: 1 where an entry is of use."""
    whole = torch.Size(target.whole_weight.shape)
    return masks.setdefault(target.module_name, torch.ones(whole, dtype=torch.uint8))


def _others(size: int, kept: Tensor) -> Tensor:
    """(n,) the indices that are not kept."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero().squeeze(1)

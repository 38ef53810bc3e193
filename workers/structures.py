"""Structures that a plan can remove beside components: attention heads, MLP neurons, sub-layers, layers, tiles.

Each is a gate that multiplies a part of what the model computes, 1 where it stands and 0 where it is gone, and each is
gone exactly when some entries of stored weights are zero: the columns of the output projection that read a head, those
of the down projection that read a neuron, the whole output projection and its bias of a sub-layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from service.reports import SkippedModule
from workers.branches import Branch, Part, find_branches, parameters_of
from workers.targets import Target, decoder_blocks


class Kind(StrEnum):
    """What a structure is."""

    HEADS = "heads"
    """Query heads, each alone."""
    GROUPS = "groups"
    """Key-value groups, each with its query heads; the same as heads where every query head has its own keys."""
    NEURONS = "neurons"
    """Gate, up and down together."""
    ATTENTION = "attention"
    """All that an attention adds to the residual stream."""
    MLP = "mlp"
    """All that an MLP adds."""
    LAYERS = "layers"
    """Both."""


@dataclass(frozen=True, eq=False)
class Unit:
    """The structures of one kind in one place: the heads of an attention, say, or a layer, which is one."""

    name: str
    """`model.layers.3.self_attn:heads`."""
    kind: str
    layer: int
    sizes: Tensor
    """(n,) int64: the parameters that are of no use once a structure is gone, for each."""

    @property
    def count(self) -> int:
        """How many structures there are."""
        return self.sizes.numel()

    @property
    def place(self) -> str:
        """`model.layers.3.self_attn`."""
        return self.name.partition(":")[0]

    @property
    def targets(self) -> tuple[Target, ...]:
        """The weights that hold what is zero when a structure is gone."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """Whether the biases of these go too."""
        return False

    def clear(self, W: Tensor, indices: Sequence[int]) -> None:
        """Set to zero what realises the gates of some structures.

        Args:
            W: (out, in) one of `targets`' weights, changed in place.
            indices: of structures.
        """
        raise NotImplementedError

    def magnitudes(self) -> Tensor:
        """(n,) how large the weights are that are zero when a structure is gone: the root of their mean square."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Columns(Unit):
    """Heads, groups of them, or neurons: each is so many neighbouring columns of the output projection."""

    branch: Branch
    width: int
    """Columns of each."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.branch.output,)

    def clear(self, W: Tensor, indices: Sequence[int]) -> None:
        first = torch.tensor(indices, device=W.device)[:, None] * self.width
        W[:, (first + torch.arange(self.width, device=W.device)).flatten()] = 0

    def magnitudes(self) -> Tensor:
        squares = self.branch.output.whole_weight.double().square().mean(0)
        return squares.reshape(self.count, self.width).mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class Whole(Unit):
    """A sub-layer, or a layer: all that its branches add to the residual stream. A layer's gate is on every branch."""

    branches: tuple[Branch, ...]

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(branch.output for branch in self.branches)

    @property
    def whole(self) -> bool:
        return True

    def clear(self, W: Tensor, indices: Sequence[int]) -> None:
        if indices:
            W.zero_()


@dataclass(frozen=True, eq=False)
class Tiles(Unit):
    """Tiles of one weight, row after row; those at its right and lower edges may be smaller."""

    target: Target
    side: int

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.target,)

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.target.shape[1] // self.side)

    def clear(self, W: Tensor, indices: Sequence[int]) -> None:
        b = self.side
        for r, c in (divmod(index, self.across) for index in indices):
            W[r * b : (r + 1) * b, c * b : (c + 1) * b] = 0

    def sums(self, entries: Tensor) -> Tensor:
        """Of each tile.

        Args:
            entries: (..., out, in)

        Returns:
            (..., n)
        """
        b, (out, in_) = self.side, self.target.shape
        padded = nn.functional.pad(entries, (0, -in_ % b, 0, -out % b))
        return padded.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).sum((-1, -3)).flatten(-2)  # type: ignore[no-untyped-call, no-any-return]

    def magnitudes(self) -> Tensor:
        W = self.target.whole_weight.double()
        return (self.sums(W.square()) / self.sizes.to(W.device)).sqrt()


@dataclass(frozen=True, eq=False)
class WandaTiles(Tiles):
    """Tiles of which a pass takes Wanda's score, not the effects."""


@dataclass(frozen=True, eq=False)
class TurningLayer(Whole):
    """A layer of which a pass takes how far it turns what it is given, not the effect."""

    block: nn.Module


@dataclass(frozen=True, eq=False)
class Pattern(Unit):
    """Of every four neighbours in a row of one weight two: the form in which hardware runs a sparse product."""

    target: Target
    mask: Tensor
    """(out, in) bool: the entries that go."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return (self.target,)

    def clear(self, W: Tensor, indices: Sequence[int]) -> None:
        if indices:
            W[self.mask] = 0

    def magnitudes(self) -> Tensor:
        return self.target.whole_weight[self.mask].double().square().mean().sqrt()[None]


def find_units(
    model: nn.Module, targets: Sequence[Target], kinds: Collection[Kind]
) -> tuple[list[Unit], list[SkippedModule]]:
    """All structures of some kinds in the model's order, and where they could not be found.

    Args:
        targets: whole weights, as `find_targets` gives them.
    """
    branches, skipped = find_branches(model, targets)
    parts = {part for kind in kinds for part in _PARTS[kind]}
    units: list[Unit] = []
    for branch in branches:
        units += [unit for kind in Kind if kind in kinds for unit in _of_branch(branch, kind)]
    if Kind.LAYERS in kinds:
        prefix, blocks = decoder_blocks(model)
        for layer, block in enumerate(blocks):
            own = tuple(branch for branch in branches if branch.layer == layer)
            if covered(block, own):
                sizes = torch.tensor([sum(branch.parameters for branch in own)])
                units.append(Whole(f"{prefix}.{layer}:all", Kind.LAYERS, layer, sizes, own))
            else:
                reason = "it is more than an attention and an MLP that are known"
                skipped.append(SkippedModule(module=f"{prefix}.{layer}", reason=reason))
    return units, skipped if len(parts) > 1 else [s for s in skipped if not _is_about_other_part(s, parts)]


def tile_units(targets: Sequence[Target], side: int, made: type[Tiles] | None = None) -> list[Unit]:
    """Every weight in tiles of side x side, of another class than `Tiles` where one is given."""
    units: list[Unit] = []
    for target in targets:
        rows, columns = (_edges(size, side) for size in target.shape)
        sizes = torch.outer(rows, columns).flatten()
        units.append((made or Tiles)(f"{target.name}:blocks{side}", f"blocks{side}", target.layer, sizes, target, side))
    return units


def pattern_units(targets: Sequence[Target]) -> tuple[list[Unit], list[SkippedModule]]:
    """Every weight with two of every four neighbours in a row as one structure, the two of least magnitude."""
    units: list[Unit] = []
    skipped: list[SkippedModule] = []
    for target in targets:
        out, in_ = target.shape
        if in_ % 4:
            skipped.append(SkippedModule(module=target.name, reason=f"its rows of {in_} are no fours"))
            continue
        order = target.whole_weight.abs().reshape(out, -1, 4).argsort(dim=-1, stable=True)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], True).reshape(out, in_)
        size = torch.tensor([out * in_ // 2])
        units.append(Pattern(f"{target.name}:2:4", "2:4", target.layer, size, target, mask))
    return units, skipped


_PARTS = {
    Kind.HEADS: (Part.ATTENTION,),
    Kind.GROUPS: (Part.ATTENTION,),
    Kind.ATTENTION: (Part.ATTENTION,),
    Kind.NEURONS: (Part.MLP,),
    Kind.MLP: (Part.MLP,),
    Kind.LAYERS: (Part.ATTENTION, Part.MLP),
}


def _is_about_other_part(skipped: SkippedModule, parts: set[Part]) -> bool:
    return any(f"its {part} " in skipped.reason for part in set(Part) - parts)


def _of_branch(branch: Branch, kind: Kind) -> Iterator[Unit]:
    """Of a branch the structures of a kind, if it has them."""
    if branch.part not in _PARTS[kind] or kind is Kind.LAYERS:
        return
    if kind in (Kind.ATTENTION, Kind.MLP):
        yield Whole(f"{branch.place}:all", kind, branch.layer, torch.tensor([branch.parameters]), (branch,))
        return
    size = branch.width * branch.output.shape[0]
    if branch.part is Part.MLP:
        per_neuron = sum(parameters_of(t) for t in branch.inputs) // branch.count
        sizes = torch.full((branch.count,), size + per_neuron)
        yield Columns(f"{branch.place}:{kind}", kind, branch.layer, sizes, branch, branch.width)
        return
    row = branch.inputs[0].shape[1] + (branch.inputs[0].bias is not None)
    head = size + branch.width * row
    if kind is Kind.HEADS:
        sizes = torch.full((branch.count,), head)
        yield Columns(f"{branch.place}:{kind}", kind, branch.layer, sizes, branch, branch.width)
        return
    sizes = torch.full((branch.count // branch.group,), branch.group * head + 2 * branch.width * row)
    yield Columns(f"{branch.place}:{kind}", kind, branch.layer, sizes, branch, branch.width * branch.group)


def covered(block: nn.Module, branches: Sequence[Branch]) -> bool:
    """Whether these are an attention and an MLP at least, and hold every matrix of the block."""
    known = {id(target.module) for branch in branches for target in (*branch.inputs, branch.output)}
    matrices = {id(m) for m in block.modules() if any(p.ndim >= 2 for p in m.parameters(recurse=False))}
    return {branch.part for branch in branches} == set(Part) and matrices <= known


def _edges(size: int, side: int) -> Tensor:
    """(n,) lengths of the pieces that a size is cut into."""
    return torch.tensor([min(side, size - at) for at in range(0, size, side)])

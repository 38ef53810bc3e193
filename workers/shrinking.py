"""What of a plan can be cut off a checkpoint, so that stock transformers loads a smaller model, and what stands as
zeros.

A layer is cut off where nothing of it is left and its block hands on what it is given; neurons and heads are where
every layer can spare as many. What is cut off is zero already: the smaller model computes what the one with zeros does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from service.reports import Zeros
from workers.branches import Branch, Part, find_branches
from workers.cuts import (
    Cut,
    Lost,
    Slice,
    losses,
    slices,
    spare_groups,
    spare_neurons,
    without_heads,
    without_neurons,
)
from workers.loading import Checkpoint
from workers.proposals import plural
from workers.ranking import Plan
from workers.smaller_configs import Misfit, SmallerConfig
from workers.structures import Unit, covered
from workers.targets import decoder_blocks, find_targets

UNEVEN = "every layer of this architecture has as many, and others lose fewer"
EVERY_LAYER = "every layer of this architecture has one"


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What of a base model can be cut off at all; made once, for any number of plans."""

    branches: tuple[Branch, ...]
    prefix: str
    """Of its blocks, `model.layers`."""
    layers: int
    removable: frozenset[int]
    """Blocks that hand on what they are given once their branches are gone."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its parameters; of one that is tied once."""
    config: SmallerConfig


@dataclass(frozen=True, eq=False)
class Smaller:
    """What a plan leaves of a checkpoint."""

    cut: Cut
    slices: Mapping[str, Slice]
    """By parameters' names in the base."""
    config: str | None
    """The text of its config.json; None where nothing is cut off."""
    gone: list[str]
    zeros: list[Zeros]


def examine(base: Checkpoint) -> Anatomy:
    """The anatomy of a base model; its weights must be its own."""
    targets, _ = find_targets(base.model)
    branches, _ = find_branches(base.model, targets)
    prefix, blocks = decoder_blocks(base.model)
    return Anatomy(
        tuple(branches),
        prefix,
        len(blocks),
        _removable(base.model, blocks, branches),
        {name: tuple(p.shape) for name, p in base.model.named_parameters()},
        SmallerConfig(base.folder),
    )


def parameters_left(anatomy: Anatomy, plan: Plan, units: Sequence[Unit]) -> int:
    """How many numbers the model has that is written of a plan. Exact, and a config for each new shape of model, built
    without memory, is all that it costs."""
    return parameters_of_smaller(anatomy, shrink(anatomy, plan, units))


def parameters_of_smaller(anatomy: Anatomy, smaller: Smaller) -> int:
    """Numbers of the model that is loaded from what is written."""
    total = 0
    for name, shape in anatomy.shapes.items():
        layer = layer_of(name, anatomy.prefix)
        if layer is None or layer in smaller.cut.layers:
            total += prod(smaller.slices[name].shape(shape) if name in smaller.slices else shape)
    return total


def shrink(anatomy: Anatomy, plan: Plan, units: Sequence[Unit]) -> Smaller:
    """What of a plan is cut off, and what stands as zeros and why."""
    lost = losses(anatomy.branches, plan, units)
    cut = Cut(tuple(range(anatomy.layers)))
    reasons: dict[str, str] = {}
    found: str | None = None
    for part, tries in (("layers", _without_layers), (Part.MLP, _without_neurons), (Part.ATTENTION, _without_heads)):
        for tried in tries(anatomy, cut, lost):
            try:
                found = anatomy.config.fitting(tried, _sliced(anatomy, tried))
            except Misfit as misfit:
                reasons.setdefault(part, str(misfit))
            else:
                cut = tried
                break
    return Smaller(
        cut,
        slices(cut, _kept(anatomy, cut)),
        found,
        _gone(anatomy, cut),
        _zeros(anatomy, cut, lost, plan, units, reasons),
    )


def as_zeros(anatomy: Anatomy, plan: Plan, units: Sequence[Unit], why: str) -> Smaller:
    """Nothing cut off, for one reason."""
    cut = Cut(tuple(range(anatomy.layers)))
    zeros = _zeros(anatomy, cut, losses(anatomy.branches, plan, units), plan, units, {})
    return Smaller(cut, {}, None, [], [Zeros(what=each.what, why=why) for each in zeros])


def layer_of(name: str, prefix: str) -> int | None:
    """The block that a parameter is in, by its name."""
    index = name.removeprefix(f"{prefix}.").partition(".")[0]
    return int(index) if name.startswith(f"{prefix}.") and index.isdigit() else None


@torch.no_grad()
def _removable(model: nn.Module, blocks: nn.ModuleList, branches: Sequence[Branch]) -> frozenset[int]:
    """The blocks whose output is their input, to the bit, when their branches add nothing; a norm behind the sum, as
    BERT's, is none. Seen by one forward over a few tokens."""
    seen: dict[int, list[bool]] = {}

    def silent(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def listen(layer: int) -> Any:
        def hear(_: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else given.get("hidden_states")
            after = output[0] if isinstance(output, tuple) else output
            same = isinstance(before, Tensor) and isinstance(after, Tensor) and torch.equal(before, after)
            seen.setdefault(layer, []).append(same)

        return hear

    with ExitStack() as stack:
        for branch in branches:
            stack.callback(branch.end.register_forward_hook(silent).remove)
        for layer, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(listen(layer), with_kwargs=True).remove)
        tokens = torch.arange(4, device=next(model.parameters()).device)[None]
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    whole = {layer for layer, block in enumerate(blocks) if covered(block, [b for b in branches if b.layer == layer])}
    return frozenset(layer for layer, same in seen.items() if same == [True] and layer in whole)


def _without_layers(anatomy: Anatomy, cut: Cut, lost: Mapping[str, Lost]) -> Iterator[Cut]:
    """All that are gone, then fewer, the first of them first: it is the first layer that is often another."""
    alive = {b.layer for b in anatomy.branches if not lost[b.output.module_name].whole}
    gone = sorted(anatomy.removable - alive)
    for n in range(1 if len(gone) == anatomy.layers else 0, len(gone)):
        yield Cut(tuple(layer for layer in cut.layers if layer not in gone[n:]))


def _without_neurons(anatomy: Anatomy, cut: Cut, lost: Mapping[str, Lost]) -> Iterator[Cut]:
    branches = _of_every_layer(anatomy, cut, Part.MLP)
    n = spare_neurons(branches, lost)
    if n:
        yield without_neurons(cut, branches, lost, n)


def _without_heads(anatomy: Anatomy, cut: Cut, lost: Mapping[str, Lost]) -> Iterator[Cut]:
    """As many as there are to spare, then fewer: a hidden size may have to be a multiple of their number."""
    branches = _of_every_layer(anatomy, cut, Part.ATTENTION)
    for n in range(spare_groups(branches, lost), -1, -1):
        tried = without_heads(cut, branches, lost, n)
        if tried != cut:
            yield tried


def _kept(anatomy: Anatomy, cut: Cut) -> list[Branch]:
    return [branch for branch in anatomy.branches if branch.layer in cut.layers]


def _of_every_layer(anatomy: Anatomy, cut: Cut, part: Part) -> list[Branch]:
    """The branches of a kind in the layers that are kept, if each has one and they are alike; none else."""
    own = [branch for branch in _kept(anatomy, cut) if branch.part is part]
    alike = len({(b.count, b.width, b.group) for b in own}) == 1 and [b.layer for b in own] == list(cut.layers)
    return own if alike else []


def _sliced(anatomy: Anatomy, cut: Cut) -> dict[str, tuple[int, ...]]:
    return {name: own.shape(anatomy.shapes[name]) for name, own in slices(cut, _kept(anatomy, cut)).items()}


# --- in words -----------------------------------------------------------------------------------------------------


def _gone(anatomy: Anatomy, cut: Cut) -> list[str]:
    words = []
    layers = sorted(set(range(anatomy.layers)) - set(cut.layers))
    if layers:
        words.append(_layers(layers))
    neurons, heads, groups = cut.widths
    first = {branch.part: branch for branch in reversed(anatomy.branches)}
    if neurons is not None:
        count = first[Part.MLP].count
        words.append(f"{count - neurons:,} of {count:,} neurons of every MLP")
    if heads is not None and groups is not None:
        of = first[Part.ATTENTION]
        words.append(f"{of.count - heads} of {of.count} query heads of every attention")
        if of.group > 1 and groups < of.count // of.group:
            words.append(f"{of.count // of.group - groups} of {of.count // of.group} heads of its keys and values")
    return words


def _zeros(
    anatomy: Anatomy,
    cut: Cut,
    lost: Mapping[str, Lost],
    plan: Plan,
    units: Sequence[Unit],
    reasons: Mapping[str, str],
) -> list[Zeros]:
    found: list[Zeros] = []
    kept = _kept(anatomy, cut)
    whole = {(b.layer, b.part) for b in kept if lost[b.output.module_name].whole}
    layers = [n for n in cut.layers if {(n, part) for part in Part} <= whole]
    if layers:
        why = reasons.get("layers")
        if why is None:
            last = anatomy.removable.issuperset(layers)
            why = "a model has one layer at least" if last else "its block does more: a norm stays, say"
        found.append(Zeros(what=_layers(layers), why=why))
    for part, noun in ((Part.ATTENTION, "query head"), (Part.MLP, "neuron")):
        only = [n for n in cut.layers if (n, part) in whole and n not in layers]
        if only:
            found.append(Zeros(what=f"the {part} of {_layers(only)}", why=EVERY_LAYER))
        parts = [b for b in kept if b.part is part and not lost[b.output.module_name].whole]
        left = {b.layer: n for b in parts if (n := len(_standing(b, cut, lost)))}
        if left:
            what = f"{plural(sum(left.values()), noun)} in {_layers(sorted(left))}"
            why = f"there cannot be fewer: {reasons[part]}" if part in reasons else UNEVEN
            found.append(Zeros(what=what, why=why))
    for kind, weights, count in _tiles(plan, units):
        what = f"{count:,} of {kind} in {weights:,} weights"
        found.append(Zeros(what=what, why="a weight is stored whole, whatever entries of it are zero"))
    return found


def _standing(branch: Branch, cut: Cut, lost: Mapping[str, Lost]) -> frozenset[int]:
    """What a branch loses and still holds."""
    name = branch.output.module_name
    kept = cut.neurons.get(name) if branch.part is Part.MLP else cut.heads.get(name)
    own = lost[name].indices
    return own if kept is None else own & set(kept)


def _tiles(plan: Plan, units: Sequence[Unit]) -> list[tuple[str, int, int]]:
    """Of tiles and patterns the kind, how many weights and how many of them."""
    found: dict[str, list[int]] = {}
    for unit in units:
        indices = plan.structures.get(unit.name)
        if indices and (unit.kind == "2:4" or unit.kind.startswith("blocks")):
            found.setdefault(unit.kind, []).append(len(indices))
    return [(kind, len(counts), sum(counts)) for kind, counts in found.items()]


def _layers(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 3, 7 and 12`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"

"""From a strategy's name and options to a search that can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from service.errors import UnusableModel
from service.reports import SkippedModule
from service.strategies import (
    BlocksOptions,
    C2IOptions,
    ComponentsOptions,
    HeadsOptions,
    LaserOptions,
    LayersOptions,
    MixedOptions,
    NeuronsOptions,
    StrategyOptions,
    decomposes,
)
from workers.c2i import C2I
from workers.examples import Encoded
from workers.laser import Laser
from workers.proposals import Components, Proposer
from workers.search import Search
from workers.structural import Classical, Heads, Layers, Mixed
from workers.structures import (
    Kind,
    TurningLayer,
    Unit,
    WandaTiles,
    Whole,
    find_units,
    pattern_units,
    tile_units,
)
from workers.subject import Subject, Track
from workers.targets import Target, decoder_blocks

SUBLAYERS = {Kind.ATTENTION, Kind.MLP}
PARTS = {"whole": {Kind.LAYERS}, "sublayers": SUBLAYERS, "both": {Kind.LAYERS, *SUBLAYERS}}
MIXED = {
    "components": set[Kind](),
    "heads": {Kind.HEADS},
    "groups": {Kind.GROUPS},
    "neurons": {Kind.NEURONS},
    "sublayers": SUBLAYERS,
    "layers": {Kind.LAYERS},
    "blocks": set(),
}


def dictionary(targets: Sequence[Target], options: StrategyOptions) -> list[Target]:
    """What is decomposed before the search and what effects are taken of: whole weights, or their row blocks.

    Args:
        targets: whole weights.
    """
    if isinstance(options, ComponentsOptions):
        return [block for target in targets for block in target.split(options.row_blocks)]
    return list(targets)


def structures(
    model: nn.Module, targets: Sequence[Target], options: StrategyOptions
) -> tuple[list[Unit], list[SkippedModule]]:
    """The structures that a strategy may remove, and where there are none.

    Args:
        targets: whole weights.

    Raises:
        UnusableModel: if there is nothing at all that the strategy could remove.
    """
    units: list[Unit] = []
    skipped: list[SkippedModule] = []
    if isinstance(options, BlocksOptions):
        if options.pattern is None:
            units = tile_units(targets, options.size, WandaTiles if options.score == "wanda" else None)
        else:
            units, skipped = pattern_units(targets)
    elif kinds := _kinds(options):
        units, skipped = find_units(model, targets, kinds)
    if isinstance(options, MixedOptions) and "blocks" in options.kinds:
        units += tile_units(targets, BlocksOptions().size)
    if isinstance(options, LayersOptions) and options.score == "block_influence":
        units = [_turning(model, unit) for unit in units if isinstance(unit, Whole)]
    if not (units or decomposes(options)):
        raise UnusableModel("no structure that the strategy removes was found in the model's blocks", param="strategy")
    return units, skipped


def _kinds(options: StrategyOptions) -> set[Kind]:
    match options:
        case HeadsOptions():
            return {Kind.GROUPS if options.groups else Kind.HEADS}
        case NeuronsOptions():
            return {Kind.NEURONS}
        case LayersOptions():
            return PARTS[options.parts]
        case MixedOptions():
            return {kind for name in options.kinds for kind in MIXED[name]}
    return set()


def _turning(model: nn.Module, unit: Whole) -> Unit:
    block = decoder_blocks(model)[1][unit.layer]
    return TurningLayer(unit.name, unit.kind, unit.layer, unit.sizes, unit.branches, block)


def parameters(targets: Sequence[Target], units: Sequence[Unit]) -> dict[str, Tensor]:
    """For each target and unit (n,), the numbers that each of its components or structures consists of."""
    of_components = {t.name: torch.full((min(t.shape),), sum(t.shape)) for t in targets}
    return of_components | {unit.name: unit.sizes for unit in units}


def make_search(
    subject: Subject,
    pool: Sequence[Encoded],
    tracks: Sequence[Track],
    result: Track,
    options: StrategyOptions,
    seed: int,
) -> Search:
    """A search by the strategy that the options are of.

    Args:
        subject: its targets are those of `dictionary`, with their spectra; its units those of `structures`.
        tracks, result: as `Search` takes them.
        seed: of what the strategy draws.
    """
    proposer = _proposer(subject, options, seed)
    if isinstance(options, C2IOptions) and options.same_samples and len(tracks) == 1:
        # Where folds are cross-fitted they are reused already: each is judged by the plans of the others.
        result = Track(result.fit, result.fit)
        tracks = [result]
    return Search(subject, pool, tracks, result, proposer)


def _proposer(subject: Subject, options: StrategyOptions, seed: int) -> Proposer[Any]:
    proposer: Proposer[Any]
    match options:
        case ComponentsOptions():
            proposer = Components()
        case LaserOptions():
            proposer = Laser(subject.targets, options, seed)
        case C2IOptions():
            proposer = C2I(subject.targets, subject.spectra, options, seed)
        case LayersOptions(score="effect"):
            proposer = Layers(_noun(options), subject.units)
        case HeadsOptions(score="effect"):
            proposer = Heads(_noun(options))
        case MixedOptions():
            proposer = Mixed(parameters(subject.targets, subject.units))
        case _ if options.score == "effect":
            proposer = Components(_noun(options))
        case _:
            coarse = isinstance(options, LayersOptions)
            proposer = Classical(_noun(options), options.score, subject.units, coarse=coarse)
    return proposer


def _noun(options: HeadsOptions | NeuronsOptions | LayersOptions | BlocksOptions) -> str:
    match options:
        case HeadsOptions():
            return "group of heads" if options.groups else "head"
        case NeuronsOptions():
            return "neuron"
        case LayersOptions():
            return "layer" if options.parts == "whole" else "layer or sub-layer"
        case BlocksOptions():
            return "tile" if options.pattern is None else "2:4 matrix"

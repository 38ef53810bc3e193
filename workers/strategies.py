"""From a strategy's name and options to a search that can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.strategies import C2IOptions, ComponentsOptions, LaserOptions, StrategyOptions
from workers.c2i import C2I
from workers.examples import Encoded
from workers.laser import Laser
from workers.proposals import Components, Proposer
from workers.search import Search, Subject, Track
from workers.targets import Target


def dictionary(targets: Sequence[Target], options: StrategyOptions) -> list[Target]:
    """What is decomposed before the search and what effects are taken of: whole weights, or their row blocks.

    Args:
        targets: whole weights.
    """
    if isinstance(options, ComponentsOptions):
        return [block for target in targets for block in target.split(options.row_blocks)]
    return list(targets)


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
        subject: its targets are those of `dictionary`, with their spectra.
        tracks, result: as `Search` takes them.
        seed: of what the strategy draws.
    """
    proposer: Proposer[Any]
    match options:
        case ComponentsOptions():
            proposer = Components()
        case LaserOptions():
            proposer = Laser(subject.targets, options, seed)
        case C2IOptions():
            proposer = C2I(subject.targets, subject.spectra, options, seed)
            if options.same_samples and len(tracks) == 1:
                # Where folds are cross-fitted they are reused already: each is judged by the plans of the others.
                result = Track(result.fit, result.fit)
                tracks = [result]
    return Search(subject, pool, tracks, result, proposer)

"""How a job's examples divide into those that are ranked by, selected on and tested on: numbers alone.

The worker deals the examples out by it (`workers.splits`); an estimate tells by it how many each part will have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CROSS_FIT_BELOW = 60
FOLDS = 4


@dataclass(frozen=True)
class Division:
    """What each of the two lists is divided into, by fractions; an empty one is taken as it is."""

    examples: Mapping[str, float] = field(default_factory=dict)
    """Of `examples`: `gradient`, `selection`, `test`, those that are split off it."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Of `validation`."""
    cross_fit: bool = False
    """Both lists are one pool, of which each fold is judged by what the others ranked."""


def divide(examples: int, validation: int | None, test: int | None) -> Division:
    """The rule.

    Args:
        examples: how many different examples there are.
        validation: how many the job brings as its selection split, None for no such list; `test` likewise.
    """
    if validation is not None and test is not None:
        return Division()
    if validation is not None and validation >= CROSS_FIT_BELOW:
        return Division(validation={"selection": 0.5, "test": 0.5})
    if examples < CROSS_FIT_BELOW:
        return Division(cross_fit=True)
    split = {"gradient": 0.4, "selection": 0.3, "test": 0.3}
    if validation is not None:
        split = {"gradient": 0.7, "test": 0.3}
    elif test is not None:
        split = {"gradient": 0.5, "selection": 0.5}
    return Division(examples=split)

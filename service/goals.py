"""What an adaptation is for: a better model, or a smaller one that loses the least."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from service.errors import InvalidInput
from service.strategies import BlocksOptions, HeadsOptions, LayersOptions, MixedOptions, Strategy, StrategyOptions
from service.strict import Strict


class Goal(StrEnum):
    """What an adaptation is for."""

    IMPROVE = "improve"
    """Remove what harms the task; the base model is returned where nothing is better."""
    COMPRESS = "compress"
    """Remove structures down to a target with the least loss, then the components that harm what is left; the
    compressed model is returned whatever it costs."""


Measure = Literal["parameters", "bytes", "decode_latency"]
MEASURES: tuple[Measure, ...] = ("parameters", "bytes", "decode_latency")
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
AS_TEXT = re.compile(r"\s*([a-z_]+)\s*=\s*([0-9.eE+-]+)\s*")


class Target(Strict):
    """How far to compress: one of the three, as a fraction of the base model's. `parameters=0.8` says the same as
    `{"parameters": 0.8}`."""

    parameters: Fraction | None = None
    """Of all numbers in the checkpoint."""
    bytes: Fraction | None = None
    """Of its weight files."""
    decode_latency: Fraction | None = None
    """Of the time that a token takes when text is generated, measured on the worker."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = AS_TEXT.fullmatch(value)
        try:
            return {found[1]: float(found[2])} if found else {}
        except ValueError:
            return {}

    @model_validator(mode="after")
    def _check(self) -> Target:
        if sum(getattr(self, measure) is not None for measure in MEASURES) != 1:
            raise ValueError(f"exactly one of {', '.join(MEASURES)} is wanted, `parameters=0.8` say")
        return self

    @property
    def measure(self) -> Measure:
        """Which of the three."""
        return next(measure for measure in MEASURES if getattr(self, measure) is not None)

    @property
    def fraction(self) -> float:
        """Of the base's."""
        return float(getattr(self, self.measure))

    def __str__(self) -> str:
        """`parameters=0.8`."""
        return f"{self.measure}={self.fraction:g}"


COMPRESSING = (Strategy.LAYERS, Strategy.NEURONS, Strategy.HEADS, Strategy.MIXED, Strategy.BLOCKS)
"""Strategies whose structures a checkpoint can be without."""
MIXED_KINDS = ("layers", "neurons", "groups")
"""Those of `mixed` in the order that they are tried in."""


def option_defaults(goal: Goal, strategy: Strategy) -> dict[str, object]:
    """What a strategy's options are where a job gives none, beside the defaults that they have themselves."""
    if goal is Goal.COMPRESS:
        match strategy:
            case Strategy.LAYERS:
                return {"parts": "whole"}
            case Strategy.HEADS:
                return {"groups": True}
            case Strategy.MIXED:
                return {"kinds": MIXED_KINDS}
    return {}


def check_goal(
    goal: Goal, target: Target | None, strategy: Strategy, options: StrategyOptions, max_drift: float | None
) -> None:
    """What must hold between a job's goal and its other fields.

    Args:
        options: as they are in force.

    Raises:
        InvalidInput: naming the field that is wrong.
    """
    if goal is Goal.IMPROVE:
        if target is not None:
            raise InvalidInput("a target is of `goal: compress`; leave it out to improve the model", param="target")
        return
    if strategy not in COMPRESSING:
        raise InvalidInput(
            f"`{strategy.value}` makes no model smaller; with `goal: compress` it is one of "
            f"{', '.join(COMPRESSING)}. `layers` is the one that makes models faster.",
            param="strategy",
        )
    if target is None:
        raise InvalidInput("how far to compress is wanted, `parameters=0.8` say", param="target")
    if strategy is Strategy.BLOCKS and target.measure != "parameters":
        raise InvalidInput(
            f"tiles stay in the files as zeros, which makes no {target.measure} less; with `blocks` the target is "
            "`parameters`, or take another strategy",
            param="target",
        )
    if max_drift is not None:
        raise InvalidInput(
            "with `goal: compress` the size is reached whatever that moves; leave max_drift out and read the drift "
            "in the report",
            param="max_drift",
        )
    _check_options(options)


def _check_options(options: StrategyOptions) -> None:
    wrong: tuple[str, str] | None = None
    if getattr(options, "score", "effect") != "effect":
        wrong = "score", "the score is `effect`"
    match options:
        case LayersOptions() if options.parts != "whole":
            wrong = "parts", "whole layers go: `whole`"
        case HeadsOptions() if not options.groups:
            wrong = "groups", "heads go with the keys and values that they share: true"
        case MixedOptions() if not set(options.kinds) <= set(MIXED_KINDS):
            wrong = "kinds", f"kinds are of {', '.join(MIXED_KINDS)}; components follow in any case"
        case BlocksOptions() if options.pattern is not None:
            wrong = "pattern", "tiles go; 2:4 leaves half of every matrix, whatever the target"
    if wrong:
        raise InvalidInput(f"with `goal: compress` {wrong[1]}", param=f"strategy_options.{wrong[0]}")

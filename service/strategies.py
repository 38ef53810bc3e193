"""The strategies of a job, and what each of them lets its user choose (METHOD 4)."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.errors import InvalidInput
from service.strict import Strict


class Strategy(StrEnum):
    """Which structures are candidates for removal. An open set: a new one is a member here with its options, and a
    proposer in `workers.strategies`."""

    COMPONENTS = "components"
    """Singular components of all target modules in one list, by t."""
    LASER = "laser"
    """One matrix after the other kept to a fraction of its rank, every one of them tried (arXiv 2312.13558)."""
    C2I = "c2i"
    """The same for a few matrices that a gradient picks, each in several row blocks (arXiv 2510.20800)."""
    HEADS = "heads"
    """Attention heads, by t."""
    NEURONS = "neurons"
    """Neurons of the MLPs, by t."""
    LAYERS = "layers"
    """Whole layers, and the attention or the MLP of a layer alone, by t."""
    BLOCKS = "blocks"
    """Square tiles of the weights, or every second weight of a matrix, by t."""
    MIXED = "mixed"
    """Components and structures of several kinds in one list, by t, and by effect for each parameter."""


Count = Annotated[int, Field(strict=True, ge=1, le=100_000)]
RowBlocks = Annotated[int, Field(strict=True, ge=1, le=1_024)]
Retention = Annotated[float, Field(strict=True, gt=0, lt=1)]
"""The fraction of the rank that is kept."""
Retentions = Annotated[tuple[Retention, ...], Field(min_length=1, max_length=100)]


class ComponentsOptions(Strict):
    """Of `components`."""

    row_blocks: RowBlocks = 1
    """Every weight is cut into so many blocks of rows, each with components of its own; 4 did worse than 1 on
    the three tasks that were tried."""


class LaserOptions(Strict):
    """Of `laser`. The defaults are LASER's own grid and order (`workers.laser`)."""

    retentions: Retentions = (0.01, 0.05, 0.1, 0.2, 0.6, 0.8, 0.9)
    order: Literal["last_first", "first_first"] = "last_first"
    """Whether the last decoder block is tried first, or the first one."""
    compose: Count = 1
    """1: the best of the grid. More: one matrix after the other in the order, each tried with those before it
    reduced and kept where it helps, until so many are."""
    sample: Count | None = None
    """So many candidates of the grid, drawn by the job's seed; null for all."""


class C2IOptions(Strict):
    """Of `c2i` (`workers.c2i` says which of these values the paper gives)."""

    matrices: Count = 5
    """How many matrices are tried, the most promising by the gradient of their singular values."""
    retentions: Retentions = (0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)
    row_blocks: Annotated[tuple[RowBlocks, ...], Field(min_length=1, max_length=100)] = (1, 2, 4, 8, 16)
    """Into how many blocks the rows of a matrix are divided; each number is tried with each retention."""
    clusters: Literal["contiguous", "kmeans"] = "contiguous"
    """Whether a block is made of neighbouring rows or of similar ones."""
    sign: Literal["taylor", "paper"] = "taylor"
    """Which sign of the gradient speaks for reducing a matrix: that of Taylor's theorem, or the other."""
    same_samples: bool = Field(default=False, strict=True)
    """Whether candidates are judged by the very examples that the gradient was taken on; without effect where examples
    are cross-fitted, which uses each for both anyway."""

    @property
    def candidates(self) -> int:
        """How many it tries, of a model with so many matrices and rows."""
        return self.matrices * len(self.retentions) * len(self.row_blocks)


class HeadsOptions(Strict):
    """Of `heads`."""

    groups: bool = Field(default=False, strict=True)
    """Whether keys and values that several heads share go with all of these; else each head goes alone."""
    score: Literal["effect", "magnitude", "michel"] = "effect"
    """What they are ranked by; all but `effect` are there to compare: the norm of a head's weights, or the mean of its
    absolute effect (Michel, Levy, Neubig, arXiv 1905.10650), the smallest first."""


class NeuronsOptions(Strict):
    """Of `neurons`."""

    score: Literal["effect", "magnitude"] = "effect"
    """What they are ranked by: their effect, or, to compare, the norm of a neuron's weights, the smallest first."""


class LayersOptions(Strict):
    """Of `layers`."""

    parts: Literal["whole", "sublayers", "both"] = "both"
    """Layers, attentions and MLPs, or all of these."""
    score: Literal["effect", "block_influence"] = "effect"
    """What they are ranked by: their effect, or, to compare, how little a layer turns what it is given (ShortGPT,
    arXiv 2403.03853), which is defined for whole layers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.score == "block_influence" and self.parts != "whole":
            raise ValueError('block_influence is defined for whole layers: give "parts": "whole" with it')
        return self


class BlocksOptions(Strict):
    """Of `blocks`."""

    size: Annotated[int, Field(strict=True, ge=16, le=128)] = 64
    """Rows and columns of a tile."""
    pattern: Literal["2:4"] | None = None
    """Instead of tiles: a candidate is a matrix of which two of every four neighbours in a row go, the smaller ones."""
    score: Literal["effect", "magnitude", "wanda"] = "effect"
    """What they are ranked by: their effect, or, to compare, the mean of |W|, or of |W| times the norm of what it is
    multiplied by (Wanda, arXiv 2306.11695), the smallest first."""


class MixedOptions(Strict):
    """Of `mixed`."""

    kinds: Annotated[
        tuple[Literal["components", "heads", "groups", "neurons", "sublayers", "layers", "blocks"], ...],
        Field(min_length=1, max_length=7),
    ] = ("components", "heads", "neurons", "sublayers")
    """What stands in the list; `blocks` are tiles of 64 x 64."""


StrategyOptions = (
    ComponentsOptions
    | LaserOptions
    | C2IOptions
    | HeadsOptions
    | NeuronsOptions
    | LayersOptions
    | BlocksOptions
    | MixedOptions
)
OPTIONS: dict[Strategy, type[StrategyOptions]] = {
    Strategy.COMPONENTS: ComponentsOptions,
    Strategy.LASER: LaserOptions,
    Strategy.C2I: C2IOptions,
    Strategy.HEADS: HeadsOptions,
    Strategy.NEURONS: NeuronsOptions,
    Strategy.LAYERS: LayersOptions,
    Strategy.BLOCKS: BlocksOptions,
    Strategy.MIXED: MixedOptions,
}


def decomposes(options: StrategyOptions) -> bool:
    """Whether the strategy needs the weights' components."""
    if isinstance(options, MixedOptions):
        return "components" in options.kinds
    return not isinstance(options, HeadsOptions | NeuronsOptions | LayersOptions | BlocksOptions)


def read_options(text: str | None) -> object:
    """Options as the command line takes them: a JSON object, checked for nothing but that it is JSON.

    Raises:
        InvalidInput: naming `strategy_options`.
    """
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(
            f"not JSON ({error}); an object is wanted, '{{\"matrices\": 3}}' say", param="strategy_options"
        ) from None

"""What a job will take: seconds of a worker, its memory, and room on the disk, told before any work is done.

The arithmetic of an adaptation is known: a forward costs 2 operations for each weight of the blocks and each token,
a backward to the activations as many, the effects of one pass 4 r for each token and matrix of rank r. What
the tokens are, the examples say; how many operations a second a worker does, it has measured itself. The constants
below are how much of the rest there is beside the arithmetic; `tests/test_smollm2.py` holds the sum within a factor
of two of what a job on a real model took.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from service.answers import Estimate
from service.division import FOLDS, divide
from service.goals import Goal
from service.jobs import JobSpec
from service.lengths import Tokens, count
from service.models import Model
from service.strategies import (
    BlocksOptions,
    C2IOptions,
    ComponentsOptions,
    LaserOptions,
    LayersOptions,
    MixedOptions,
    StrategyOptions,
)

# Of a block's matrices, as every architecture names its layers: `model.layers.7.mlp.up_proj.weight`.
IN_BLOCK = re.compile(r"\.\d+\.")
# A pass tries about so many candidates, on a part of the selection split where that leaves enough to judge them by
# (`workers.search`), and the best of them on all of it, beside the model as it stood.
CANDIDATES = 10
JUDGED_IN_PART_FROM = 100
PART_JUDGED = 0.2
JUDGED_WHOLE = 2.0
# A candidate of a grid changes one matrix, and is run from its block on.
GRID_CANDIDATE = 0.6
# `compress` tries so many layers in a step, so many orders of other structures a round, on a part of the examples.
LAYERS_TRIED = 8
ORDERS = 4
CHOSEN_ON = 0.5
# Most jobs end before their last pass: the fraction of the passes behind the first that run.
LATER_PASSES = 0.6
# Of `compress`: passes of components in its last round at most, as `workers.rounds` has it.
LAST_PASSES = 8
# Of the neutral text that drift is measured on, in tokens; read again for each plan.
NEUTRAL_TOKENS = 1_130
# Operations of a symmetric eigendecomposition in float64, beside n^3; and its speed beside a float32 product's.
EIGENVECTORS = 9.0
FLOAT64 = 0.12
# Batches of a few hundred rows do not reach what a large square product does.
EFFICIENCY = 0.75
# Bytes a second read, hashed and written with a sync.
DISK_SPEED = 400e6
# The libraries in a process, before a model.
LIBRARIES_BYTES = 500_000_000
# Tokens in a batch and logits at once (`workers.examples`); what a batch keeps, beside each matrix's input and output.
BATCH_TOKENS = 1024
LOGITS = 2**26
ACTIVATIONS = 1.3
# An adapter's bytes beside the model's.
ADAPTER = 0.02
# Without a worker to ask: a current server core.
ASSUMED_SPEED = 50e9


@dataclass(frozen=True)
class Size:
    """A model, as far as its weights' headers tell."""

    matrices: int
    """In blocks: those that may lose components."""
    block_parameters: int
    """Of the matrices in blocks: what every token passes."""
    squared_ranks: int
    """Sum of rank^2 over those: what effects cost a token, and the numbers that a decomposition keeps."""
    cubed_ranks: int
    """Sum of rank^3: what a decomposition costs."""
    gram: int
    """Sum of rank^2 x the longer side: what their Gram matrices cost."""
    widths: int
    """Sum of both sides: the numbers that a token leaves behind for the backward."""
    head_parameters: int
    """Of the matrix that makes logits."""
    blocks: int
    """Layers."""
    parameters: int
    bytes: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], bytes: int) -> Size:
        """Sizes of a model by the shapes of its tensors."""
        matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and IN_BLOCK.search(name)]
        others = [shape for name, shape in shapes.items() if len(shape) == 2 and not IN_BLOCK.search(name)]
        return cls(
            matrices=len(matrices),
            block_parameters=sum(a * b for a, b in matrices),
            squared_ranks=sum(min(shape) ** 2 for shape in matrices),
            cubed_ranks=sum(min(shape) ** 3 for shape in matrices),
            gram=sum(min(shape) ** 2 * max(shape) for shape in matrices),
            widths=sum(a + b for a, b in matrices),
            head_parameters=max((a * b for a, b in others), default=0),
            blocks=len({found[0] for name in shapes if (found := IN_BLOCK.search(name))}),
            parameters=sum(_product(shape) for shape in shapes.values()),
            bytes=bytes,
        )


@dataclass(frozen=True)
class Loads:
    """A job's three splits in tokens; under cross-fitting the first two are the same rows."""

    gradient: Tokens
    selection: Tokens
    test: Tokens
    backwards_a_pass: int
    """Of passes behind the first: one for each fold and one for the result, where folds judge."""

    @classmethod
    def of(cls, spec: JobSpec, model: Model) -> Loads:
        """What the worker will make of a job's examples, without dealing them out."""
        lists = {"examples": spec.examples, "validation": spec.validation, "test": spec.test}
        found = {name: count(model, examples) for name, examples in lists.items() if examples is not None}
        examples, validation, test = (found.get(name, NOTHING) for name in lists)
        rule = divide(examples.rows, *(found[name].rows if name in found else None for name in ("validation", "test")))
        if rule.cross_fit:
            pool = _sum(examples, validation)
            return cls(pool, pool, test, FOLDS + 1)
        parts = {
            **{name: _share(examples, share) for name, share in rule.examples.items()},
            **{name: _share(validation, share) for name, share in rule.validation.items()},
        }
        return cls(parts.get("gradient", examples), parts.get("selection", validation), parts.get("test", test), 1)


NOTHING = Tokens(0, 0, 0)


def _share(tokens: Tokens, share: float) -> Tokens:
    return Tokens(*(round(share * n) for n in (tokens.rows, tokens.total, tokens.answers)))


def _sum(a: Tokens, b: Tokens) -> Tokens:
    return Tokens(a.rows + b.rows, a.total + b.total, a.answers + b.answers)


def estimate(size: Size, loads: Loads, spec: JobSpec, *, speed: float | None, decomposed: bool) -> Estimate:
    """What an adaptation takes.

    Args:
        speed: operations a second of a float32 product on a worker; None where no worker has told.
        decomposed: the model's decompositions are in the cache.
    """
    rate = (speed or ASSUMED_SPEED) * EFFICIENCY
    passes, options, compressing = spec.passes, spec.options, spec.goal is Goal.COMPRESS
    # `compress` makes a pass before its first round, one in each and more in its last, and takes effects of structures
    # in each.
    expected = 1 + (passes + LATER_PASSES * (LAST_PASSES - 1) if compressing else LATER_PASSES * (passes - 1))
    backwards = 1 + (expected - 1 + (passes if compressing else 0)) * loads.backwards_a_pass
    by_components = spec.decomposes
    effects = 4 * size.squared_ranks * loads.gradient.total if by_components else 0
    if isinstance(options, BlocksOptions):
        effects = 2 * size.block_parameters * loads.gradient.total
    neutral = 2 * (size.block_parameters + size.head_parameters) * NEUTRAL_TOKENS
    plans = passes + 1 if compressing else 2 if passes == 1 else 3
    evaluations = expected * _evaluations(size, loads, ComponentsOptions() if compressing else options)
    evaluations += _choices(size, loads, spec) if compressing else 0
    reading = size.bytes / DISK_SPEED
    stages = {
        "loading": 2.0 + reading,
        "decomposing": _decomposing(size, rate, decomposed) if by_components else 0.0,
        "backward": backwards * (forward_backward(size, loads) + effects) / rate,
        "searching": evaluations * _forward(size, loads.selection) / rate,
        "verifying": (plans * _forward(size, loads.test) + (plans + 1) * neutral) / rate,
        "publishing": 2.0 + 4 * reading * spec.models,
    }
    spectra = 4 * size.squared_ranks if by_components else 0
    weights = 4 * size.parameters
    batch = min(BATCH_TOKENS, loads.gradient.total)
    activations = int(ACTIVATIONS * 4 * size.widths * batch) + 2 * 4 * LOGITS
    return Estimate(
        seconds=round(sum(stages.values()), 1),
        stages={stage: round(seconds, 1) for stage, seconds in stages.items()},
        memory_bytes=LIBRARIES_BYTES + weights + spectra + max(activations, 2 * weights),
        disk_bytes=int((spec.copies + ADAPTER) * size.bytes) + (0 if decomposed else spectra),
        tokens=loads.gradient.total + loads.selection.total + loads.test.total,
        measured_speed=speed is not None,
    )


def _decomposing(size: Size, rate: float, decomposed: bool) -> float:
    """Seconds."""
    if decomposed:
        return 4 * size.squared_ranks / DISK_SPEED
    return (2 * size.gram + EIGENVECTORS * size.cubed_ranks) / (rate * FLOAT64)


def forward_backward(size: Size, loads: Loads) -> float:
    """Operations of one forward and backward to the activations over the gradient split: one FB."""
    return 2 * _forward(size, loads.gradient)


def _evaluations(size: Size, loads: Loads, options: StrategyOptions) -> float:
    """Forwards over the selection split in a pass."""
    if not isinstance(options, LaserOptions | C2IOptions):
        part = PART_JUDGED if loads.selection.rows >= JUDGED_IN_PART_FROM else 1.0
        lists = 3 if isinstance(options, MixedOptions) else 1
        return lists * CANDIDATES * part + JUDGED_WHOLE
    if isinstance(options, LaserOptions):
        grid = size.matrices * len(options.retentions)
        return GRID_CANDIDATE * min(options.sample or grid, grid) + 1
    return GRID_CANDIDATE * options.candidates + 1


def _choices(size: Size, loads: Loads, spec: JobSpec) -> float:
    """Forwards over the selection split that `compress` chooses structures by, in all rounds; every fold's own."""
    options, target = spec.options, spec.target.fraction if spec.target else 1.0
    layers = isinstance(options, LayersOptions) or (isinstance(options, MixedOptions) and "layers" in options.kinds)
    of_layers = (
        LAYERS_TRIED * GRID_CANDIDATE * size.blocks * min(1.0, (1 - target) * size.parameters / size.block_parameters)
    )
    lists = (len(options.kinds) - layers) if isinstance(options, MixedOptions) else 1 - layers
    tracks = FOLDS + 1 if loads.backwards_a_pass > 1 else 1
    return tracks * CHOSEN_ON * ((of_layers if layers else 0) + spec.passes * (1 + ORDERS * lists))


def _forward(size: Size, load: Tokens) -> float:
    return 2.0 * (size.block_parameters * load.total + size.head_parameters * load.answers)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total

"""Methods of `c2i bench` that remove structures: to better the model, or as many as it takes to come to a size.

A name is `[compress/]STRATEGY[/VARIANT][@SIZE]`: `heads`, `heads/michel`, `blocks/2:4`, `neurons/magnitude@0.9`.
Without a size it is one pass of the strategy, as a job of that strategy runs it. With a size, a fraction of the model's
parameters, the first structures by the score go until no more than that is left: one backward and no search, so that
scores are held against each other at equal size. Of `effect` there are three orders, by t, by the predicted fall for
each parameter and by the least change, and the one of least loss on the selection split is taken. `magnitude@SIZE` is
unstructured magnitude pruning (Han et al., arXiv 1506.02626): the smallest entries of all target weights, wherever they
are. It ships nothing smaller and nothing faster, and is there as the point of comparison. `compress/layers@0.8` is a
job of the goal `compress` (`workers.benchmark.compressed`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.goals import COMPRESSING, Goal, option_defaults
from service.strategies import (
    OPTIONS,
    BlocksOptions,
    HeadsOptions,
    LayersOptions,
    MixedOptions,
    NeuronsOptions,
    Strategy,
    StrategyOptions,
)
from workers.benchmark.cells import OBJECTIVE, Bench, Cell
from workers.benchmark.clock import now
from workers.evaluation import evaluate
from workers.gradients import effects
from workers.ranking import Plan, plan_of, t_scores
from workers.strategies import structures
from workers.structural import Classical
from workers.structures import Pattern, Unit
from workers.subject import Subject

VARIANTS: dict[str, dict[str, StrategyOptions]] = {
    "heads": {
        "": HeadsOptions(),
        "groups": HeadsOptions(groups=True),
        "magnitude": HeadsOptions(score="magnitude"),
        "michel": HeadsOptions(score="michel"),
    },
    "neurons": {"": NeuronsOptions(), "magnitude": NeuronsOptions(score="magnitude")},
    "layers": {
        "": LayersOptions(),
        "whole": LayersOptions(parts="whole"),
        "block_influence": LayersOptions(parts="whole", score="block_influence"),
    },
    "blocks": {
        "": BlocksOptions(),
        "16": BlocksOptions(size=16),
        "magnitude": BlocksOptions(score="magnitude"),
        "wanda": BlocksOptions(score="wanda"),
        "2:4": BlocksOptions(pattern="2:4"),
    },
    "mixed": {"": MixedOptions()},
    "magnitude": {},
}
"""Options of each strategy by the name of a variant; the plain name's is ''."""
NAME = re.compile(r"(?P<goal>compress/)?(?P<strategy>[a-z]+)(/(?P<variant>[a-z0-9_:]+))?(@(?P<size>0\.\d{1,3}))?")


@dataclass(frozen=True)
class OnePass:
    """One pass of a strategy."""

    options: StrategyOptions


@dataclass(frozen=True)
class ToSize:
    """The first structures by a score, down to a fraction of the parameters."""

    strategy: str
    options: StrategyOptions | None
    """None for unstructured magnitude."""
    size: float


@dataclass(frozen=True)
class Compress:
    """A job of that goal."""

    options: StrategyOptions
    size: float


Method = OnePass | ToSize | Compress


COMPRESSED: dict[str, StrategyOptions] = {
    strategy.value: OPTIONS[strategy].model_validate(option_defaults(Goal.COMPRESS, strategy))
    for strategy in COMPRESSING
    if strategy is not Strategy.BLOCKS  # makes no file smaller
}
"""Those of `compress/`, as a job has them."""


def parse(name: str) -> Method | None:
    """What a method's name says; None if it is none of these.

    Raises:
        InvalidInput: a strategy of ours with a variant that it does not have, or at a size that it cannot come to.
    """
    found = NAME.fullmatch(name)
    if found is None or found["strategy"] not in VARIANTS:
        return None
    strategy, variant = found["strategy"], found["variant"] or ""
    size = float(found["size"]) if found["size"] else None
    if found["goal"]:
        if size is None or variant or strategy not in COMPRESSED:
            could = ", ".join(f"compress/{name}@0.8" for name in COMPRESSED)
            raise InvalidInput(f"no method {name}; there are {could} or of another size", param="methods")
        return Compress(COMPRESSED[strategy], size)
    known = VARIANTS[strategy]
    if known and variant not in known:
        named = ", ".join(f"{strategy}/{other}" for other in known if other)
        raise InvalidInput(f"no method {name}; of {strategy} there are {named or 'no variants'}", param="methods")
    options = known.get(variant)
    if size is None:
        if options is None:
            raise InvalidInput(f"{name} has no size; magnitude@0.9 leaves nine tenths", param="methods")
        return OnePass(options)
    if strategy == "magnitude" and variant:
        raise InvalidInput(f"no method {name}; magnitude@0.9 leaves nine tenths", param="methods")
    if options in (MixedOptions(), LayersOptions()):
        # A layer and its attention are both in such a list: what is left of one depends on the other.
        raise InvalidInput(f"{name}: structures that overlap are not counted to a size; layers/whole", param="methods")
    return ToSize(strategy, options, size)


def subject_with(cell: Cell, method: Method) -> Subject:
    """The cell's subject with the structures that a method removes."""
    bench = cell.bench
    if isinstance(method, ToSize) and method.options is None:
        return replace(cell.subject, units=smallest_entries(bench, method.size))
    options = method.options
    units = structures(bench.base.model, bench.targets, options)[0] if options is not None else []
    return replace(cell.subject, units=units)


def smallest_entries(bench: Bench, size: float) -> list[Unit]:
    """Of each target its entries under one threshold of |W| for all, under which as many lie as have to go."""
    gone = _gone(bench, size)
    largest = torch.cat([target.whole_weight.abs().float().flatten().cpu() for target in bench.targets])
    if gone > largest.numel():
        raise InvalidInput(f"magnitude@{size:g} is more than all target weights together", param="methods")
    threshold = float(largest.kthvalue(gone).values)
    units: list[Unit] = []
    for target in bench.targets:
        mask = target.whole_weight.abs().float() <= threshold
        name = f"{target.name}:magnitude"
        units.append(Pattern(name, "magnitude", target.layer, mask.sum()[None].cpu(), target, mask))
    return units


def _gone(bench: Bench, size: float) -> int:
    """How many parameters have to go."""
    return round((1 - size) * sum(p.numel() for p in bench.base.model.parameters()))


def left(subject: Subject, plan: Plan) -> float:
    """The parameters that are not removed with a structure, as a fraction of the model's."""
    total = sum(p.numel() for p in subject.model.parameters())
    gone = sum(int(unit.sizes[list(plan.structures.get(unit.name, ()))].sum()) for unit in subject.units)
    return 1 - gone / total


def plan_to_size(cell: Cell, subject: Subject, method: ToSize) -> tuple[Plan, float]:
    """The structures that a method removes to come to its size, and the seconds that took."""
    started = now()
    classical = _classical(method, subject)
    if method.options is None:
        return plan_of({unit.name: (0,) for unit in subject.units}), now() - started
    gone = _gone(cell.bench, method.size)
    found = _effects(cell, subject) if classical is None or classical.by_effects else {}
    sizes = {unit.name: unit.sizes.double() for unit in subject.units}
    if classical is not None:
        ranking = classical.rank(found, range(len(cell.rows.gradient)), Plan())
        named = zip(ranking.module.tolist(), ranking.component.tolist(), strict=True)
        order = [(ranking.modules[m], i) for m, i in named]
        return _first(order, sizes, gone, method), now() - started
    orders = (
        {name: t_scores(a) for name, a in found.items()},
        {name: a.double().mean(0).cpu() / sizes[name] for name, a in found.items()},
        {name: -a.double().abs().mean(0).cpu() for name, a in found.items()},
    )
    plans = [_first(_descending(scores), sizes, gone, method) for scores in orders]
    losses = [_selection_loss(cell, subject, plan) for plan in plans]
    return plans[losses.index(min(losses))], now() - started


def _classical(method: ToSize, subject: Subject) -> Classical | None:
    """The score of a method, if it is not the effect."""
    score = getattr(method.options, "score", "effect")
    return None if score == "effect" else Classical(method.strategy, score, subject.units)


def _effects(cell: Cell, subject: Subject) -> Mapping[str, Tensor]:
    model, rows = subject.model, cell.rows.gradient
    return effects(model, [], {}, rows, OBJECTIVE, cell.layout, units=subject.units)[0].by_module


def _descending(scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    named = [(name, i) for name, own in scores.items() for i in range(len(own))]
    order = torch.cat([own.double().cpu() for own in scores.values()]).argsort(descending=True, stable=True)
    return [named[k] for k in order.tolist()]


def _first(order: Sequence[tuple[str, int]], sizes: Mapping[str, Tensor], gone: int, method: ToSize) -> Plan:
    chosen: dict[str, list[int]] = {}
    left = float(gone)
    for name, i in order:
        if left <= 0:
            break
        chosen.setdefault(name, []).append(i)
        left -= float(sizes[name][i])
    if left > 0:
        raise InvalidInput(f"all {method.strategy} together are less than @{method.size:g} asks for", param="methods")
    return plan_of(chosen)


def _selection_loss(cell: Cell, subject: Subject, plan: Plan) -> float:
    with subject.without(plan):
        return float(evaluate(subject.model, cell.rows.selection, OBJECTIVE, cell.layout).loss.mean())

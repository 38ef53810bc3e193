"""Which structures go, where a model is to get down to a size with the least loss.

One round takes the effects of all structures from one backward and leaves a plan that is down to the round's size; no
test is asked for, since the size must be reached. What first order says of many structures at once is far off, so
every choice is made by evaluating the model without them:

- layers go one at a time. Those that effects speak for and those that cost least in the step before are tried, and the
  one without which the loss is least goes;
- of neurons and key-value groups every layer loses as many, so that a configuration can say how many are left. Which
  ones, several orders propose, and the one of least loss is taken;
- tiles in one list over all weights, by the same orders;
- of a mix each kind is tried down to the round's size, and the one of least loss is taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from service.strategies import BlocksOptions, LayersOptions, MixedOptions, StrategyOptions
from workers.footprint import gone_layers
from workers.proposals import plural
from workers.ranking import CERTAIN, Plan, plan_of
from workers.structures import Columns, Kind, Unit

# Layers tried in a step, and so many of them for what they cost in the step before.
TRIED = 8
TRIED_AGAIN = 5

Scores = Mapping[str, Tensor]
"""For each unit (n,) of its structures; the highest go first."""


class Ground(Protocol):
    """What one track's choice is made on."""

    plan: Plan
    """What is gone already."""
    effects: Mapping[str, Tensor]
    """For each unit (N, n): the fall of each example's loss when a structure goes, to first order."""

    def left(self, plan: Plan) -> float:
        """How much of the base a plan leaves, in what the target counts."""

    def fits(self, plan: Plan) -> bool:
        """Whether a plan is down to the round's size."""

    def go_on(self, plan: Plan) -> None:
        """Further plans contain this one: they are tried from the first block on that they touch beyond it."""

    def loss(self, plan: Plan, description: str) -> float:
        """Mean loss of the model without a plan, on examples that the choice may see.

        Args:
            description: what goes beyond `self.plan`, in words.
        """


class Chooser(Protocol):
    """One way to get down to a size."""

    def most(self) -> list[Plan]:
        """The largest plans that it could choose."""

    def choose(self, ground: Ground) -> Plan | None:
        """A plan that fits and contains what is gone already; None where it has none."""


def make_chooser(options: StrategyOptions, units: Sequence[Unit], multiple: int = 1) -> Chooser:
    """The chooser of a strategy's structures.

    Args:
        units: those of the strategy.
        multiple: the columns of a weight that loses structures are left a multiple of this, if they are one now.
    """
    match options:
        case MixedOptions():
            by_kind: list[Chooser] = [ByLayers(units)] if "layers" in options.kinds else []
            kinds = {"neurons": Kind.NEURONS, "groups": Kind.GROUPS}
            by_kind += [Uniform(units, kind, multiple) for name, kind in kinds.items() if name in options.kinds]
            return Cheapest(by_kind)
        case LayersOptions():
            return ByLayers(units)
        case BlocksOptions():
            return ByTiles(units)
    return Uniform(units, units[0].kind, multiple)


class ByLayers:
    """Whole layers, one at a time."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = [unit for unit in units if unit.kind == Kind.LAYERS]
        self.all_units = units

    def most(self) -> list[Plan]:
        return [plan_of({unit.name: (0,) for unit in self.units[1:]})]

    def choose(self, ground: Ground) -> Plan | None:
        plan, cost = ground.plan, dict[str, float]()
        while not ground.fits(plan):
            gone = gone_layers(plan, self.units)
            left = [unit for unit in self.units if unit.layer not in gone]
            if len(left) < 2:
                return None
            smaller, cost = self._step(ground, plan, left, cost)
            if smaller is None:
                return None
            plan = smaller
            ground.go_on(plan)
        return plan

    def _step(
        self, ground: Ground, plan: Plan, left: Sequence[Unit], before: Mapping[str, float]
    ) -> tuple[Plan | None, dict[str, float]]:
        """The plan without one layer more, of those that make the model smaller the one of least loss, and what each
        that was tried costs. Where a block depends on its place, a layer can be cut off at the end alone."""
        cost: dict[str, float] = {}
        now, untried = ground.left(plan), list(left)
        while untried:
            for unit in (tried := self._promising(untried, ground.effects, before)):
                words = f"layer {unit.layer}, of {len(left)}"
                cost[unit.name] = ground.loss(_with(plan, unit.name, (0,)), words)
            for unit in sorted(tried, key=lambda unit: cost[unit.name]):
                smaller = _with(plan, unit.name, (0,))
                if ground.left(smaller) < now:
                    return smaller, cost
            untried = [unit for unit in untried if unit.name not in cost]
        return None, cost

    def _promising(self, left: Sequence[Unit], effects: Mapping[str, Tensor], cost: Mapping[str, float]) -> list[Unit]:
        """Those of least loss in the step before; then, in turn, those whose removal is predicted to lower the loss
        most and those that are predicted to change it least."""
        again = sorted((unit for unit in left if unit.name in cost), key=lambda unit: cost[unit.name])[:TRIED_AGAIN]
        reached = [unit for unit in left if unit.name in effects] or list(left)
        falls = {unit.name: effects[unit.name] if unit.name in effects else torch.zeros(1, 1) for unit in reached}
        by_fall = sorted(reached, key=lambda unit: -float(falls[unit.name].mean()))
        by_change = sorted(reached, key=lambda unit: float(falls[unit.name].abs().mean()))
        in_turn = [unit for pair in zip(by_fall, by_change, strict=True) for unit in pair]
        return list(dict.fromkeys([*again, *in_turn]))[:TRIED]


class Uniform:
    """Structures of one kind, of every layer as many."""

    def __init__(self, units: Sequence[Unit], kind: str, multiple: int = 1) -> None:
        self.kind = kind
        self.multiple = multiple
        self.all_units = units
        self.units = [unit for unit in units if unit.kind == kind]
        self.magnitudes = {unit.name: unit.magnitudes() for unit in self.units}

    def most(self) -> list[Plan]:
        n = max(_counts(self.units, self.multiple), default=0)
        return [plan_of({unit.name: range(n) for unit in self.units if n})]

    def choose(self, ground: Ground) -> Plan | None:
        gone = gone_layers(ground.plan, self.all_units)
        left = [unit for unit in self.units if unit.layer not in gone]
        if not left:
            return None
        before = max(len(ground.plan.structures.get(unit.name, ())) for unit in left)
        counts = [n for n in _counts(left, self.multiple) if n >= before]

        def plan_by(scores: Scores, n: int) -> Plan:
            return ground.plan.union(plan_of({u.name: _first(ground.plan, u, scores[u.name], n) for u in left}))

        orders = _orders(ground.effects, left, self.magnitudes)
        some = next(iter(orders.values()))
        at = bisect_left(counts, True, key=lambda n: ground.fits(plan_by(some, n)))
        if at == len(counts):
            return None
        words = f"{plural(counts[at], NOUNS[self.kind])} of every layer"
        return _least({f"{words} by {name}": plan_by(scores, counts[at]) for name, scores in orders.items()}, ground)


class ByTiles:
    """Tiles of all weights, in one list."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.magnitudes = {unit.name: unit.magnitudes() for unit in units}

    def most(self) -> list[Plan]:
        return [plan_of({unit.name: range(unit.count) for unit in self.units})]

    def choose(self, ground: Ground) -> Plan | None:
        found: dict[str, Plan] = {}
        for name, scores in _orders(ground.effects, self.units, self.magnitudes).items():
            # A tile that is gone already is in the list as well, where adding it changes nothing.
            of_all = torch.cat([scores[unit.name] for unit in self.units])
            owner = torch.cat([torch.full((unit.count,), k) for k, unit in enumerate(self.units)])
            index = torch.cat([torch.arange(unit.count) for unit in self.units])
            order = of_all.argsort(descending=True, stable=True)
            listed = list(zip(owner[order].tolist(), index[order].tolist(), strict=True))

            def first(n: int, listed: Sequence[tuple[int, int]] = listed) -> Plan:
                chosen: dict[str, list[int]] = {}
                for k, i in listed[:n]:
                    chosen.setdefault(self.units[k].name, []).append(i)
                return ground.plan.union(plan_of(chosen))

            n = bisect_left(range(len(listed) + 1), True, key=lambda n: ground.fits(first(n)))
            if n <= len(listed):
                found[f"{plural(n, 'tile')} by {name}"] = first(n)
        return _least(found, ground)


class Cheapest:
    """Whichever of several ways costs least."""

    def __init__(self, choosers: Sequence[Chooser]) -> None:
        self.choosers = choosers

    def most(self) -> list[Plan]:
        return [plan for chooser in self.choosers for plan in chooser.most()]

    def choose(self, ground: Ground) -> Plan | None:
        plans = [plan for chooser in self.choosers if (plan := chooser.choose(ground)) is not None]
        return min(plans, key=lambda plan: ground.loss(plan, _difference(plan, ground.plan)), default=None)


def _counts(units: Sequence[Unit], multiple: int) -> list[int]:
    """How many structures of each unit can go: one stays, of heads as many as transformers takes, which wants the
    width of the residual stream to be a multiple of their number, and of both as many as leave a weight's columns a
    multiple where they are one."""
    found = []
    columns = [(unit.count, unit.width) for unit in units if isinstance(unit, Columns)]
    bound = [(count, width) for count, width in columns if count * width % multiple == 0]
    for n in range(min((unit.count for unit in units), default=0)):
        heads = [(u.count - n) * u.branch.group for u in units if isinstance(u, Columns) and u.kind == Kind.GROUPS]
        widths = [u.branch.output.shape[0] for u in units if isinstance(u, Columns) and u.kind == Kind.GROUPS]
        whole = all(width % left == 0 for width, left in zip(widths, heads, strict=True))
        if n == 0 or (whole and all((count - n) * width % multiple == 0 for count, width in bound)):
            found.append(n)
    return found


NOUNS: dict[str, str] = {Kind.NEURONS: "neuron", Kind.GROUPS: "group of heads"}


def _orders(
    effects: Mapping[str, Tensor], units: Sequence[Unit], magnitudes: Mapping[str, Tensor]
) -> dict[str, Scores]:
    """Several opinions on what goes first, by name."""
    taken = {u.name: effects[u.name].double() if u.name in effects else torch.zeros(2, u.count) for u in units}
    return {
        "mean effect": {name: a.mean(0).cpu() for name, a in taken.items()},
        "least change": {name: -a.abs().mean(0).cpu() for name, a in taken.items()},
        "moderated t": _moderated(taken),
        "magnitude": {unit.name: -magnitudes[unit.name].cpu() for unit in units},
    }


def _moderated(effects: Mapping[str, Tensor]) -> Scores:
    """m / (se + s0), as `Ranking.moderated`, of harmless structures too."""
    means = {name: a.mean(0).cpu() for name, a in effects.items()}
    errors = {name: a.std(0).cpu() / a.shape[0] ** 0.5 for name, a in effects.items()}
    m, se = (torch.cat(list(of.values())) for of in (means, errors))
    certain = se[m.abs() > CERTAIN * se]
    s0 = float(certain.median()) if certain.numel() else 1.0
    return {name: means[name] / (errors[name] + s0) for name in means}


def _first(plan: Plan, unit: Unit, scores: Tensor, n: int) -> list[int]:
    """So many of a unit's structures: those that are gone already, then the highest scores."""
    gone = list(plan.structures.get(unit.name, ()))
    order = scores.clone()
    order[gone] = torch.inf
    return order.argsort(descending=True, stable=True)[:n].tolist()


def _least(plans: Mapping[str, Plan], ground: Ground) -> Plan | None:
    """The plan of least loss, by the words that each is told in."""
    different = list(dict.fromkeys(map(_key, plans.values())))
    if len(different) == 1:
        return next(iter(plans.values()))
    losses = {words: ground.loss(plan, words) for words, plan in plans.items()}
    return plans[min(losses, key=losses.__getitem__)] if losses else None


def _key(plan: Plan) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(plan.structures.items())


def _with(plan: Plan, name: str, indices: tuple[int, ...]) -> Plan:
    return plan.union(plan_of({name: indices}))


def _difference(plan: Plan, before: Plan) -> str:
    kinds: dict[str, int] = {}
    for name, own in plan.structures.items():
        kind = name.rpartition(":")[2]
        kinds[kind] = kinds.get(kind, 0) + len(set(own) - set(before.structures.get(name, ())))
    return " and ".join(f"{n} {kind}" for kind, n in kinds.items() if n)

"""Strategies whose candidates are structures: heads, neurons, layers, tiles, and all of them with components.

Ranked by t like components, and searched like them (`workers.proposals`). Beside that:

- layers are few, and what first order says of one is often a large part of the loss: their plans grow one by one, and
  none is left out for being predicted too well;
- of a mixed list, t tells how certain each candidate's effect is and nothing of how much of the model goes with it. So
  there is a second order, by effect for each parameter among the certain ones, and the lists of each kind alone, which
  the others have to beat;
- classical scores, to compare: the smallest go first, whatever the effects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workers.proposals import Components, Growing, Proposals, counted, growing, plural
from workers.ranking import CERTAIN, Plan, Ranking, Single, is_unit, rank, sizes
from workers.structures import Unit


def coarse_sizes(ranking: Ranking, loss: float) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 and so on, and all."""
    most = len(ranking)
    grid = sorted({1, *(2**k for k in range(1, 20)), *(3 * 2**k for k in range(20))})
    return [*(n for n in grid if n < most), most] if most else []


def doubling_sizes(ranking: Ranking, loss: float) -> list[int]:
    """2, 4, 8 and so on, and all."""
    most = len(ranking)
    return [*(2**k for k in range(1, 20) if 2**k < most), most] if most else []


class Heads(Components):
    """Heads, or groups of them: a few may be the best already."""

    def _lists(self, believed: Sequence[Ranking], loss: float) -> list[Growing]:
        lists = [growing(believed, loss, counted(self.noun, "by t"), doubling_sizes)]
        if len(believed[-1]):
            moderated = [r.moderated() for r in believed]
            lists.append(growing(moderated, loss, counted(self.noun, "by moderated t"), doubling_sizes))
        return lists


class Layers(Components):
    """Layers and sub-layers: few and coarse. What takes nothing that those before it in a list have left is not in it:
    the attention of a layer that is gone."""

    def __init__(self, noun: str, units: Sequence[Unit]) -> None:
        super().__init__(noun)
        self.holds = {unit.name: {target.name for target in unit.targets} for unit in units}

    def propose(self, ranked: Sequence[Ranking], plans: Sequence[Plan], loss: float) -> Proposals:
        lists = [growing([self._distinct(r) for r in ranked], loss, counted(self.noun, "by t"), coarse_sizes)]
        if len(ranked[-1]):
            by_fall = [self._distinct(r.by(r.fall)) for r in ranked]
            lists.append(growing(by_fall, loss, counted(self.noun, "by effect"), coarse_sizes))
        return Proposals(lists=lists)

    def _distinct(self, ranking: Ranking) -> Ranking:
        gone: set[str] = set()
        idle: set[Single] = set()
        for m, i in zip(ranking.module.tolist(), ranking.component.tolist(), strict=True):
            name = ranking.modules[m]
            if self.holds[name] <= gone:
                idle.add((name, i))
            gone |= self.holds[name]
        return ranking.without(idle)


class Mixed(Components):
    """Components and structures."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """
        Args:
            parameters: for each target and unit (n,), those of each component or structure.
        """
        super().__init__("structure")
        self.parameters = parameters

    def _lists(self, believed: Sequence[Ranking], loss: float) -> list[Growing]:
        lists: list[Growing] = []
        alone = [r.by(torch.where(r.in_units, -torch.inf, r.t)) for r in believed]
        if len(alone[-1]):
            lists += Components()._lists(alone, loss)
        for kind in dict.fromkeys(name.rpartition(":")[2] for name in believed[-1].modules if is_unit(name)):
            own = [r.by(torch.where(_of_kind(r, kind), r.t, -torch.inf)) for r in believed]
            lists.append(growing(own, loss, Composed("by t")))
        if len(alone[-1]) < len(believed[-1]):
            lists.append(growing(believed, loss, Composed("by t")))
            dense = [r.by(self._density(r)) for r in believed]
            if len(dense[-1]):
                lists.append(growing(dense, loss, Composed("by effect for each parameter")))
        return lists

    def _density(self, ranking: Ranking) -> Tensor:
        """(n,) the predicted fall for each parameter; for what is not certain, minus infinity."""
        named = zip(ranking.module.tolist(), ranking.component.tolist(), strict=True)
        each = torch.tensor([int(self.parameters[ranking.modules[m]][i]) for m, i in named], dtype=torch.float64)
        return torch.where(ranking.t > CERTAIN, ranking.fall / each, -torch.inf)


def _of_kind(ranking: Ranking, kind: str) -> Tensor:
    """(n,) bool: which candidates are structures of a kind, as units' names end."""
    ends = [is_unit(name) and name.rpartition(":")[2] == kind for name in ranking.modules]
    return torch.tensor(ends, dtype=torch.bool)[ranking.module]


class Composed:
    """Words of a plan: `9 components and 3 heads by t`."""

    def __init__(self, order: str) -> None:
        self.order = order

    def __call__(self, ranking: Ranking, n: int) -> str:
        names = [ranking.modules[m] for m in ranking.module[:n].tolist()]
        counts = Counter(name.rpartition(":")[2] if is_unit(name) else "components" for name in names)
        words = [plural(count, NOUNS[kind]) for kind, count in counts.items()]
        return f"{' and '.join(words)} {self.order}"


NOUNS = {
    "components": "component",
    "heads": "head",
    "groups": "group of heads",
    "neurons": "neuron",
    "all": "layer or sub-layer",
    "blocks64": "tile",
}


class Classical(Components):
    """The smallest by a score that knows nothing of harm, first."""

    def __init__(self, noun: str, score: str, units: Sequence[Unit], *, coarse: bool = False) -> None:
        super().__init__(noun)
        self.score = score
        self.coarse = coarse
        self.static = {unit.name: unit.magnitudes() for unit in units} if score == "magnitude" else None
        self.by_effects = self.static is None

    def rank(self, effects: Mapping[str, Tensor], rows: Sequence[int], removed: Plan) -> Ranking:
        of_each = self.static
        if of_each is None:
            # What the recorders took is the score on each example; Michel's is the absolute effect.
            of_each = {name: a[list(rows)].abs().double().mean(0) for name, a in effects.items()}
        names = tuple(of_each)
        if not names:
            return rank({})
        module = torch.cat([torch.full((len(of_each[name]),), k) for k, name in enumerate(names)])
        component = torch.cat([torch.arange(len(of_each[name])) for name in names])
        scores = torch.cat([of_each[name].double().cpu() for name in names])
        ranking = Ranking(names, module, component, torch.ones_like(scores), torch.zeros_like(scores))
        gone = {(name, i) for name, own in removed.removed.items() for i in own}
        return ranking.by(-scores).without(gone)

    def propose(self, ranked: Sequence[Ranking], plans: Sequence[Plan], loss: float) -> Proposals:
        grid = coarse_sizes if self.coarse else sizes
        words = counted(self.noun, f"by {self.score.replace('_', ' ')}")
        return Proposals(lists=[growing(ranked, loss, words, grid, predicts=False)])

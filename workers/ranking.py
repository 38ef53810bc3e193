"""From effects to plans: which components to remove, in what order, and how many at a time.

The mean effect alone is noise: about half of all components are predicted to be harmful. What separates signal is
significance across examples (METHOD 3):

    t_i = mean_n a[n, i] / (std_n a[n, i] / sqrt(N))

All components of all modules stand in one list, by t descending; a plan removes the first n of it. A second list has
those in front that gain much as well (`Ranking.moderated`): which of the two is better depends on the task.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# A component of which first order predicts that the loss falls by more than this share of it is in no list and
# tried with the best plan alone: of one that was to gain 3.8 of 6.2 removal cost 6.7, and spoilt every plan with it.
CREDIBLE = 0.1
# Sizes begin where this share of the loss is predicted to go, with so many components at most.
FIRST_STEP = 0.2
SMALLEST = 16
# Components with a t beyond this tell what a usual standard error is.
CERTAIN = 2.0

Indices = Mapping[str, tuple[int, ...]]
Single = tuple[str, int]
"""One component or structure: its target's or unit's name, and its index."""


@dataclass(frozen=True)
class Plan:
    """What is removed: for each module the indices of its components, for each unit those of its structures,
    ascending."""

    components: Indices = field(default_factory=dict)
    structures: Indices = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of components and structures removed."""
        return sum(map(len, (*self.components.values(), *self.structures.values())))

    @property
    def removed(self) -> Indices:
        """Components and structures, by the names of targets and units."""
        return {**self.components, **self.structures}

    def union(self, other: Plan) -> Plan:
        """What either removes, names in sorted order."""
        return Plan(_union(self.components, other.components), _union(self.structures, other.structures))


def plan_of(removed: Mapping[str, Collection[int]]) -> Plan:
    """The plan that removes these components and structures, by the names of targets and units."""
    ordered = {name: tuple(sorted(removed[name])) for name in sorted(removed)}
    return Plan(
        {name: own for name, own in ordered.items() if not is_unit(name)},
        {name: own for name, own in ordered.items() if is_unit(name)},
    )


def is_unit(name: str) -> bool:
    """Whether a name is a unit's, `model.layers.3.mlp:neurons`, and no weight's, of whichever rows."""
    return ":" in name and not name.endswith("]")


def _union(a: Indices, b: Indices) -> Indices:
    return {name: tuple(sorted({*a.get(name, ()), *b.get(name, ())})) for name in sorted({*a, *b})}


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates for removal, the most certainly harmful first."""

    modules: tuple[str, ...]
    module: Tensor
    """(n,) int64: index into `modules`."""
    component: Tensor
    """(n,) int64: index into the module's singular values."""
    t: Tensor
    """(n,) positive."""
    fall: Tensor
    """(n,) the fall in mean loss predicted for removing each alone."""

    def __len__(self) -> int:
        return self.t.numel()

    @cached_property
    def in_units(self) -> Tensor:
        """(n,) bool: which are structures."""
        return torch.tensor([is_unit(name) for name in self.modules], dtype=torch.bool)[self.module]

    @cached_property
    def predicted(self) -> Tensor:
        """(n,) the fall in mean loss predicted for removing the first 1, 2, ... n."""
        return self.fall.cumsum(0)

    def moderated(self) -> Ranking:
        """By m / (se + s0), m the fall, se = m / t its standard error and s0 the median of se where t > 2: what is
        certain and small comes later (Tusher, Tibshirani, Chu, PNAS 98 (2001) 5116: the moderated t of SAM)."""
        errors = self.fall / self.t
        certain = errors[self.t > CERTAIN]
        s0 = certain.median() if certain.numel() else 0.0
        order = (self.fall / (errors + s0)).argsort(descending=True, stable=True)
        return self._only(order)

    def doubtful(self, loss: float) -> dict[Single, float]:
        """Components, in order, whose fall is too large a share of the mean loss to be believed, and that fall."""
        at = (self.fall > CREDIBLE * loss).nonzero().squeeze(1).tolist()
        return {(self.modules[int(self.module[k])], int(self.component[k])): float(self.fall[k]) for k in at}

    def without(self, left_out: Collection[Single]) -> Ranking:
        """The ranking without some components."""
        named = zip(self.module.tolist(), self.component.tolist(), strict=True)
        kept = torch.tensor([(self.modules[m], i) not in left_out for m, i in named], dtype=torch.bool)
        return self._only(kept)

    def by(self, score: Tensor) -> Ranking:
        """The candidates in another order: the highest score (n,) first, infinitely low ones not at all."""
        order = score.argsort(descending=True, stable=True)
        return self._only(order[score[order] > -torch.inf])

    def _only(self, which: Tensor) -> Ranking:
        """Some of the candidates: (k,) int64 in the order wanted, or (n,) bool."""
        return Ranking(self.modules, self.module[which], self.component[which], self.t[which], self.fall[which])

    def first(self, n: int) -> Plan:
        """The plan that removes the first n."""
        chosen: dict[str, list[int]] = {}
        for m, i in zip(self.module[:n].tolist(), self.component[:n].tolist(), strict=True):
            chosen.setdefault(self.modules[m], []).append(i)
        return plan_of(chosen)


def t_scores(a: Tensor) -> Tensor:
    """t of each component.

    Args:
        a: (N, rank) effects.

    Returns:
        (rank,); 0 where all effects are equal, as they are for a component that is already gone.
    """
    N = a.shape[0]
    a = a.double()
    std = a.std(0)
    return torch.where(std > 0, a.mean(0) / (std / N**0.5), 0.0)


def rank(effects: Mapping[str, Tensor], rows: Sequence[int] | None = None, removed: Plan | None = None) -> Ranking:
    """Order the components with t > 0 by t; ties stay in the model's order, so the same effects always give the
    same ranking.

    Args:
        effects: for each module (N, rank).
        rows: the examples to rank by; all, if None.
        removed: what is gone already.
    """
    gone = removed.removed if removed else {}
    modules, index, ts, means = tuple(effects), [], [], []
    owners = []
    for m, (name, a) in enumerate(effects.items()):
        used = a if rows is None else a[list(rows)]
        t = t_scores(used)
        t[list(gone.get(name, ()))] = 0.0
        keep = (t > 0).nonzero().squeeze(1)
        index.append(keep.cpu())
        owners.append(torch.full_like(index[-1], m))
        ts.append(t[keep].cpu())
        means.append(used.double().mean(0)[keep].cpu())
    if not modules:
        none = torch.zeros(0, dtype=torch.float64)
        return Ranking((), none.long(), none.long(), none, none)
    t, order = torch.cat(ts).sort(descending=True, stable=True)
    return Ranking(modules, torch.cat(owners)[order], torch.cat(index)[order], t, torch.cat(means)[order])


def sizes(ranking: Ranking, loss: float) -> list[int]:
    """How many components the candidate plans remove: a geometric grid by factors of two, from the first few that are
    predicted to lower the mean loss by a part of it, `SMALLEST` at most.

    What first order predicts does not end it. Its sum is far off long before the loss rises again (the best of a pass
    may be predicted to fall by several times the loss), so the search goes on while the loss falls.
    """
    most = len(ranking)
    grid = []
    n = min(int((ranking.predicted < FIRST_STEP * loss).sum()) + 1, SMALLEST)
    while n < most:
        grid.append(n)
        n *= 2
    return [*grid, most] if most else []

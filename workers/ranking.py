"""From effects to plans: which components to remove, in what order, and how many at a time.

The mean effect alone is noise: about half of all components are predicted to be harmful. What separates signal is
significance across examples (METHOD 3):

    t_i = mean_n a[n, i] / (std_n a[n, i] / sqrt(N))

All components of all modules stand in one list, by t descending; a plan removes the first n of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Past this multiple of the loss itself a first-order prediction is not to be believed (METHOD 4).
TRUST = 3.0
SMALLEST = 16


@dataclass(frozen=True)
class Plan:
    """What is removed: for each module the indices of its removed components, ascending."""

    components: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of components removed."""
        return sum(map(len, self.components.values()))

    def union(self, other: Plan) -> Plan:
        """What either removes, modules in sorted order."""
        names = sorted({*self.components, *other.components})
        return Plan({n: tuple(sorted({*self.components.get(n, ()), *other.components.get(n, ())})) for n in names})


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates for removal, the most certainly harmful first."""

    modules: tuple[str, ...]
    module: Tensor
    """(n,) int64: index into `modules`."""
    component: Tensor
    """(n,) int64: index into the module's singular values."""
    t: Tensor
    """(n,) descending."""
    predicted: Tensor
    """(n,) the fall in mean loss predicted for removing the first 1, 2, ... n."""

    def __len__(self) -> int:
        return self.t.numel()

    def first(self, n: int) -> Plan:
        """The plan that removes the first n."""
        chosen: dict[str, list[int]] = {}
        for m, i in zip(self.module[:n].tolist(), self.component[:n].tolist(), strict=True):
            chosen.setdefault(self.modules[m], []).append(i)
        return Plan({name: tuple(sorted(chosen[name])) for name in sorted(chosen)})


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
        removed: components that are gone already.
    """
    gone = removed.components if removed else {}
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
    return Ranking(modules, torch.cat(owners)[order], torch.cat(index)[order], t, torch.cat(means)[order].cumsum(0))


def sizes(ranking: Ranking, loss: float, smallest: int = SMALLEST) -> list[int]:
    """How many components the candidate plans remove: a geometric grid from `smallest` by factors of two, capped
    where the predicted fall exceeds `TRUST` times the loss."""
    trusted = int((ranking.predicted <= TRUST * loss).sum())
    most = max(min(trusted, len(ranking)), min(smallest, len(ranking)))
    grid = []
    n = smallest
    while n < most:
        grid.append(n)
        n *= 2
    return [*grid, most] if most else []

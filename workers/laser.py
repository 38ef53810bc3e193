"""LASER (Sharma, Ash, Misra, "The Truth is in There", arXiv 2312.13558): matrices kept to a fraction of their rank.

An intervention is a matrix type, a layer and a retention rho: the matrix is replaced by its approximation of rank
`floor(rho * rank)`. All are tried, and the one that helps most on a validation set is taken; here, the one of highest
accuracy, and of equally accurate ones that of least loss. From the paper:

- rho is one of .9, .8, .6, .2, .1, .05, .01 (its table 5), which is the default here;
- the approach is for every matrix of every layer (its section 4), as is done here; its experiments search the two MLP
  matrices of all layers alone, to save time (its section 5.1 and table 5);
- reductions are composed by a greedy search over type, layer and rho from the largest layer and the smallest rho, on
  the validation set (its section 5.1). Its authors write (issue 19 of their repository) that reductions found one by
  one cannot simply be put together, since whether one helps depends on the others.

So with `compose` the grid is walked once, matrix by matrix: each is tried with those before it reduced, its best
retention kept if that helps. The paper leaves open in which order the matrices of one layer are tried; here, in the
model's. Its code approximates by a randomised SVD (`torch.svd_lowrank`); this is exact. Another pass is a search of
the whole grid with the reductions of the passes before it: greedy too, by the best of all matrices at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from torch import Tensor

from service.strategies import LaserOptions
from workers.proposals import Proposal, Proposals
from workers.ranking import Plan
from workers.targets import Target
from workers.truncation import tail


class Laser:
    """Every matrix with every retention."""

    nested = False
    by_effects = False

    def __init__(self, targets: Sequence[Target], options: LaserOptions, seed: int) -> None:
        """
        Args:
            targets: whole weights.
            seed: of the sample of the grid.
        """
        ordered = sorted(targets, key=lambda t: t.layer, reverse=options.order == "last_first")  # stable
        self.grid = [(target, retention) for target in ordered for retention in options.retentions]
        if options.sample is not None and options.sample < len(self.grid):
            drawn = np.random.default_rng(seed).choice(len(self.grid), options.sample, replace=False)
            self.grid = [self.grid[i] for i in sorted(drawn.tolist())]
        self.compose = options.compose

    def rank(self, effects: Mapping[str, Tensor], rows: Sequence[int], removed: Plan) -> None:
        """Nothing: no matrix is preferred to another."""

    def propose(self, ranked: Sequence[None], plans: Sequence[Plan], loss: float) -> Proposals:
        found = []
        for target, retention in self.grid:
            plan = Plan({target.name: tail(min(target.shape), retention)})
            size = plan.union(plans[-1]).size - plans[-1].size
            if size:
                description = f"{target.name} kept to {100 * retention:g} %"
                found.append((target.name, Proposal(description, size, None, partial(_for_every_track, plan))))
        if self.compose == 1:
            return Proposals([[proposal for _, proposal in found]])
        rounds = [[proposal for _, proposal in group] for _, group in groupby(found, key=lambda named: named[0])]
        return Proposals(rounds or [[]], most_kept=self.compose)


def _for_every_track(plan: Plan, track: int) -> Plan:
    return plan

"""Compress to Impress (Sreeram, Maalouf, Sharma, Rus, arXiv 2510.20800): LASER where a gradient points.

What its abstract states: only a small subset of matrices needs to be inspected; the gradient of each matrix's
singular values tells which; rows may cluster around several subspaces, and each cluster is decomposed by itself; 100
samples suffice, both for the gradient and for measuring accuracy. One gradient step, then a quick scan of the top
matrices and factorizations.

What the abstract leaves open, no more text of it being at hand here, and what is chosen:

- how the gradients of one matrix become its score: the sum, over all of its singular values, of the gradients that
  speak for shrinking them, the others counting as none. No number of small singular values has to be chosen;
- their sign: by Taylor's theorem shrinking s lowers the loss where dL/ds is positive. `sign="paper"` takes the
  negative ones, as secondary sources have it (METHOD 3), to compare;
- how many matrices (5), which retentions (LASER's with .4 added) and numbers of blocks (1, 2, 4, 8, 16);
- how rows are clustered: neighbouring rows, or k-means on the rows as they are. Every block is kept to the same
  retention of its own rank;
- whether the samples of gradient and accuracy are the same ones. Here accuracy is measured on the selection split;
  `same_samples` measures it on the gradient split.

A candidate is a matrix, a number of blocks and a retention. All are judged, and the one of highest accuracy is
taken, then of lowest loss. Another pass takes the gradient of the reduced model, and leaves reduced matrices alone:
truncations of one matrix into different blocks do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from service.strategies import C2IOptions
from workers.proposals import Proposal, Proposals
from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.targets import Target
from workers.truncation import tail, tails

# A singular value under this fraction of the largest is rounding, and a gradient by it would be too.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, eq=False)
class Promising:
    """The matrices that one track would try, the most promising first."""

    names: list[str]
    effects: dict[str, Tensor]
    """Of each (rank,): the mean effect of its components."""


class C2I:
    """A few matrices in several numbers of row blocks with every retention."""

    nested = False
    by_effects = True

    def __init__(
        self, targets: Sequence[Target], spectra: Mapping[str, Spectrum], options: C2IOptions, seed: int
    ) -> None:
        """
        Args:
            targets: whole weights.
            spectra: of the targets.
            seed: of k-means.
        """
        self.targets = {target.name: target for target in targets}
        self.spectra = spectra
        self.options = options
        self.seed = seed
        self._blocks: dict[tuple[str, int], list[Target]] = {}

    def rank(self, effects: Mapping[str, Tensor], rows: Sequence[int], removed: Plan) -> Promising:
        made = {block.name: name for (name, _), blocks in self._blocks.items() for block in blocks}
        reduced = {made.get(name, name) for name in removed.components}
        means = {name: a[list(rows)].double().mean(0) for name, a in effects.items() if name not in reduced}
        scores = {
            name: score(mean, self.spectra[name].S, shrink=1 if self.options.sign == "taylor" else -1)
            for name, mean in means.items()
        }
        names = sorted(scores, key=lambda name: -scores[name])[: self.options.matrices]
        return Promising(names, {name: means[name] for name in names})

    def propose(self, ranked: Sequence[Promising], plans: Sequence[Plan], loss: float) -> Proposals:
        # A candidate is the m-th matrix of each track's own ranking.
        def truncated(m: int, K: int, retention: float, track: int) -> Plan:
            blocks = self._in_blocks(ranked[track].names[m], K)
            return Plan(tails({block.name: min(block.shape) for block in blocks}, retention))

        result, last = ranked[-1], len(ranked) - 1
        rows = "row blocks" if self.options.clusters == "contiguous" else "row clusters"
        proposals = []
        for m in range(min(len(one.names) for one in ranked)):
            name = result.names[m]
            for K in self.options.row_blocks:
                for retention in self.options.retentions:
                    addition = partial(truncated, m, K, retention)
                    size = addition(last).size
                    if not size:
                        continue
                    description = f"{name} kept to {100 * retention:g} %" + (f" in {K} {rows}" if K > 1 else "")
                    fall = None  # a block's components are others than those that the gradient was taken of
                    if K == 1:
                        mean = result.effects[name]
                        fall = float(mean[list(tail(mean.numel(), retention))].sum())
                    proposals.append(Proposal(description, size, fall, addition))
        tried = dict.fromkeys(name for one in ranked for name in one.names)
        blocks = [
            block for name in tried for K in self.options.row_blocks if K > 1 for block in self._in_blocks(name, K)
        ]
        return Proposals([proposals], blocks=blocks)

    def _in_blocks(self, name: str, K: int) -> list[Target]:
        if (name, K) not in self._blocks:
            target = self.targets[name]
            contiguous = self.options.clusters == "contiguous"
            self._blocks[name, K] = target.split(K) if contiguous else target.cluster(K, self.seed)
        return self._blocks[name, K]


def score(mean: Tensor, S: Tensor, shrink: int) -> float:
    """How much the gradient of a matrix's singular values speaks for reducing it.

    Args:
        mean: (rank,) `s dL/ds`, over the examples.
        S: (rank,) the singular values.
        shrink: 1 if a positive dL/ds speaks for shrinking s, -1 if a negative one.
    """
    S = S.to(mean)
    gradient = torch.where(NEGLIGIBLE * S[0] < S, mean / S, 0.0)
    return float((shrink * gradient).clamp_min(0).sum())

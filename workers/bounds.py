"""`max_drift`: which candidates a search may try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from workers.proposals import Proposal
from workers.ranking import Plan

# Where the bound ends a growing grid, the sizes between are halved this often, and on until one is allowed.
BISECTIONS = 2


@dataclass(frozen=True)
class DriftBound:
    """It binds the result's plan alone, whole, from the base: the plans of other tracks are returned to nobody and
    only estimate what the result is worth."""

    drift: Callable[[Plan], float]
    most: float

    def allows(self, plan: Plan) -> bool:
        """A drift that is not a number is over every bound."""
        return self.drift(plan) <= self.most

    def within(
        self,
        grid: Sequence[Proposal],
        of_size: Callable[[int], Proposal],
        plan_of: Callable[[Proposal], Plan],
        refused: list[Proposal],
    ) -> Iterator[Proposal]:
        """The candidates of a growing grid that are allowed, measured as they are asked for: up to the first that is
        over, and the largest found between the last two. Drift grows with size, all but always.

        Args:
            of_size: a candidate between two of the grid.
            plan_of: what the result would be.
            refused: what is over is added here, so that the last of it is the least.
        """
        last = 0
        for proposal in grid:
            if not self.allows(plan_of(proposal)):
                refused.append(proposal)
                break
            yield proposal
            last = proposal.size
        if not refused:
            return
        allowed, halved, found = last, 0, None
        while refused[-1].size - allowed > 1 and (halved < BISECTIONS or not allowed):
            middle, halved = of_size((allowed + refused[-1].size) // 2), halved + 1
            if self.allows(plan_of(middle)):
                allowed, found = middle.size, middle
            else:
                refused.append(middle)
        if found is not None:
            yield found


def with_refused(reason: str, tried: int, refused: Sequence[Proposal], *, nested: bool) -> str:
    """Why a round ended as it did, and what the bound has kept it from trying.

    Args:
        refused: of plans of growing size, `nested`, the least last.
    """
    if not refused:
        return reason
    if nested:
        who = f"removing {refused[-1].description}" if tried else "the least that could be removed"
    else:
        who = f"{len(refused)} of {tried + len(refused)} candidates"
    told = f"{who} would take the drift over max_drift"
    return f"{reason}; {told}" if tried else told

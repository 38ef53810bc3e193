"""What a strategy says to the search: which plans to try, and the default strategy, `components`.

A strategy proposes, the search judges. Each pass gives a strategy the effects that every track has taken on its own
examples; the strategy ranks for each track, and proposes candidates that are one for all tracks: the first 128
components, the second matrix kept to 5 %. What they remove is each track's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from torch import Tensor

from workers.ranking import Plan, Ranking, is_unit, plan_of, rank, sizes
from workers.targets import Target

T = TypeVar("T")
# Of components whose predicted fall is not believed, at most so many a pass are tried beside the lists.
SINGLES = 2


@dataclass(frozen=True, eq=False)
class Proposal:
    """One candidate."""

    description: str
    """What the result's track would remove, in words."""
    size: int
    """How many components the result's track would remove beyond its plan."""
    fall: float | None
    """How far first order predicts that the result's loss falls."""
    addition: Callable[[int], Plan]
    """What track k would remove beyond its plan; made when asked for, since many candidates are never tried."""


def joined(a: Proposal, b: Proposal) -> Proposal:
    """What two candidates remove that have nothing in common."""
    fall = None if a.fall is None or b.fall is None else a.fall + b.fall
    size = a.size + b.size
    return Proposal(
        f"{b.description} and {a.description}", size, fall, lambda track: a.addition(track).union(b.addition(track))
    )


@dataclass(frozen=True, eq=False)
class Growing:
    """Candidates each of which contains the one before it."""

    candidates: Sequence[Proposal]
    of_size: Callable[[int], Proposal]
    """One between two of them."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """The candidates of one pass."""

    rounds: Sequence[Sequence[Proposal]] = ((),)
    """At least one. Of each the best is kept if it helps, and the rounds after it go on from there."""
    most_kept: int = 1
    """The pass ends when so many rounds have kept a candidate."""
    lists: Sequence[Growing] = ()
    """Nested candidates, tried in the one round that there is then; the best of all lists is kept."""
    singles: Sequence[Proposal] = ()
    """Beside nested candidates: what is in none of them, and is tried with the best of them."""
    blocks: Sequence[Target] = ()
    """Row blocks that the candidates remove components of, beside the targets that effects are taken of."""


class Proposer(Protocol[T]):
    """A strategy under way."""

    nested: bool
    """Whether each candidate contains the one before it: they are then judged on a few examples first, while they
    get better, by their loss, and accepted by a test of it. Else every candidate is judged on all examples, and the
    one of highest accuracy taken."""
    by_effects: bool
    """Whether a ranking needs effects, and so every pass a backward. The first pass takes one anyway: its time is
    the unit of cost."""

    def rank(self, effects: Mapping[str, Tensor], rows: Sequence[int], removed: Plan) -> T:
        """What one track would remove, in order.

        Args:
            effects: for each target (N, rank); empty where none were taken.
            rows: the examples among N that the track is fitted on.
            removed: the track's plan so far.
        """

    def propose(self, ranked: Sequence[T], plans: Sequence[Plan], loss: float) -> Proposals:
        """The candidates of a pass.

        Args:
            ranked: of each track, the result's last.
            plans: of each track so far.
            loss: the current mean loss.
        """


class Words(Protocol):
    """What a plan of so many removes, in words, by the ranking that it is the beginning of."""

    def __call__(self, ranking: Ranking, n: int) -> str: ...


def counted(noun: str, order: str) -> Words:
    """`3 heads by t`."""
    return lambda ranking, n: f"{plural(n, noun)} {order}"


def plural(n: int, noun: str) -> str:
    """`1 head`, `3 groups of heads`, `2 layers or sub-layers`, `2 2:4 matrices`."""
    if n == 1:
        return f"1 {noun}"
    irregular = {"layer or sub-layer": "layers or sub-layers", "group of heads": "groups of heads"}
    return f"{n} {irregular.get(noun, noun + 's')}".replace("matrixs", "matrices")


def growing(
    ranked: Sequence[Ranking],
    loss: float,
    words: Words,
    grid: Callable[[Ranking, float], list[int]] = sizes,
    *,
    predicts: bool = True,
) -> Growing:
    """The first n of each track's ranking, n on a growing grid.

    Args:
        predicts: whether the rankings hold what first order says.
    """
    result = ranked[-1]

    def first(n: int, track: int) -> Plan:
        return ranked[track].first(n)

    def of_size(n: int) -> Proposal:
        fall = float(result.predicted[n - 1]) if predicts else None
        return Proposal(words(result, n), n, fall, partial(first, n))

    return Growing([of_size(n) for n in grid(result, loss)], of_size)


class Components:
    """Singular components of all targets in one list, by t and by moderated t; the first n of either go, n on a growing
    grid (METHOD 4). Those whose predicted fall is not believed are in neither and are tried with the best."""

    nested = True
    by_effects = True

    def __init__(self, noun: str = "component") -> None:
        """
        Args:
            noun: what is ranked, where that is structures of one kind.
        """
        self.noun = noun

    def rank(self, effects: Mapping[str, Tensor], rows: Sequence[int], removed: Plan) -> Ranking:
        return rank(effects, rows, removed)

    def propose(self, ranked: Sequence[Ranking], plans: Sequence[Plan], loss: float) -> Proposals:
        doubtful = [r.doubtful(loss) for r in ranked]
        believed = [r.without(own) for r, own in zip(ranked, doubtful, strict=True)]

        def single(k: int, track: int) -> Plan:
            """The k-th of those that the track does not believe; nothing where it has no so many."""
            return plan_of({name: (i,) for name, i in islice(doubtful[track], k, k + 1)})

        singles = [
            Proposal(self._single(name, i), 1, fall, partial(single, k))
            for k, ((name, i), fall) in enumerate(islice(doubtful[-1].items(), SINGLES))
        ]
        return Proposals(lists=self._lists(believed, loss), singles=singles)

    def _lists(self, believed: Sequence[Ranking], loss: float) -> list[Growing]:
        lists = [growing(believed, loss, counted(self.noun, "by t"))]
        if len(believed[-1]):
            lists.append(growing([r.moderated() for r in believed], loss, counted(self.noun, "by moderated t")))
        return lists

    def _single(self, name: str, i: int) -> str:
        return f"{self.noun} {i} of {name.partition(':')[0] if is_unit(name) else name}"

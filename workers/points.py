"""The points of `compress`: each round's model, written, read back, and put on the curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.reports import CurvePoint
from workers.checkpoints import shipped_of
from workers.evaluation import Outcome
from workers.rounds import Rounds
from workers.speed import weight_bytes


@dataclass(frozen=True)
class Place:
    """Where the model of a round is written."""

    number: int
    """Of the round, from 1."""
    folder: str
    """Below the job's files; holds `model/`. Empty for the last round."""

    @property
    def path(self) -> str:
        """Of the model."""
        return f"{self.folder}/model" if self.folder else "model"


def places(rounds: int) -> list[Place]:
    """Of each round, in order."""
    return [Place(k, f"points/{k}" if k < rounds else "") for k in range(1, rounds + 1)]


def curve(rounds: Rounds, outcomes: Mapping[int, Outcome], out: Path, base: Path) -> list[CurvePoint]:
    """What each round left.

    Args:
        outcomes: on the test split, by the round's number.
        out: where the models were written.
        base: the base model's folder.
    """
    base_bytes = weight_bytes(base)
    points = []
    for place in places(len(rounds.descriptions)):
        outcome = outcomes[place.number]
        points.append(
            CurvePoint(
                number=place.number,
                parameters=rounds.parameters(rounds.search.plans[place.number], shipped_of(out / place.path)),
                bytes=weight_bytes(out / place.path) / base_bytes,
                removed=rounds.descriptions[place.number - 1],
                accuracy=outcome.accuracy,
                exact_match=float(outcome.exact.mean()),
                loss=None if outcome.broken else float(outcome.loss.mean()),
                path=place.path,
            )
        )
    return points

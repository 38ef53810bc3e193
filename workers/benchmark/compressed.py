"""`compress/STRATEGY@SIZE` of `c2i bench`: a job of the goal `compress`, what its model takes and how fast it is."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from service.goals import Target
from service.reports import Speed
from service.strategies import StrategyOptions
from workers.benchmark.clock import now
from workers.checkpoints import write_model
from workers.compressing import make_chooser
from workers.footprint import Footprint
from workers.loading import Checkpoint
from workers.ranking import Plan
from workers.rounds import Aim, Rounds
from workers.search import Search
from workers.speed import measure, weight_bytes
from workers.subject import Subject

ROUNDS = 2
"""As a job of two passes."""


@dataclass(frozen=True)
class Size:
    """Of a written model, over the base's; both measured in one run."""

    bytes: float
    peak_memory: float
    prefill: float
    """Tokens a second."""
    decode: float | None
    """Tokens a second; None for a masked language model."""
    energy: float | None
    """Joules for a token; None where the machine tells none."""


def compress(
    search: Search, options: StrategyOptions, size: float, base: Checkpoint, parameters: int
) -> tuple[Plan, float]:
    """The plan of the last round, and the seconds that all took.

    Args:
        search: of components; its subject has the structures.
        size: fraction of the base's parameters.
        parameters: of the base.

    Raises:
        InvalidInput: the size cannot be reached.
    """
    units = search.subject.units
    footprint = Footprint.of(base, units, parameters=parameters, bytes=weight_bytes(base.folder))
    aim = Aim(make_chooser(options, units), footprint, Target(parameters=size))
    rounds = Rounds(search, aim, aim.size())
    started = now()
    rounds.run(ROUNDS, lambda stage, number, fraction, message: None)
    return search.plans[-1], now() - started


def written_size(base: Checkpoint, subject: Subject, plan: Plan) -> Size:
    """Write a plan's model, and hold it against the base."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, base, subject.targets, subject.spectra, plan, subject.units)
        of_base, of_model = measure([base.folder, folder])
    return over(of_base, of_model)


def over(base: Speed, model: Speed) -> Size:
    """A model's figures as parts of the base's."""
    decode, joules = base.decode_tokens_per_second, base.joules_per_token
    return Size(
        model.bytes / base.bytes,
        model.peak_memory_bytes / base.peak_memory_bytes,
        model.prefill_tokens_per_second / base.prefill_tokens_per_second,
        None if decode is None else (model.decode_tokens_per_second or 0.0) / decode,
        None if not joules or model.joules_per_token is None else model.joules_per_token / joules,
    )

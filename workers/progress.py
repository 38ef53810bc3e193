"""Where an adaptation is, for its user, and what each stage took, for its report."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.jobs import Stage
from service.reports import Cost

# Where each stage begins and ends, in percent. Backward, ranking and searching alternate within one span.
SPANS = {
    Stage.LOADING: (0.0, 5.0),
    Stage.DECOMPOSING: (5.0, 20.0),
    Stage.VERIFYING: (85.0, 93.0),
    Stage.PUBLISHING: (93.0, 100.0),
}
PASSES_SPAN = (20.0, 85.0)
# How a pass divides: up to half for the backward, then the search.
BACKWARD_SHARE = 0.4
# Before this an estimate of the time left would be a guess.
ETA_FROM_PERCENT = 8.0


@dataclass
class Clock:
    """Seconds of the passes by kind of work; `fb` is one forward and backward, the unit of cost."""

    decomposing: float = 0.0
    """What a strategy had decomposed beside the model's weights; never part of the cost in FB."""
    backward: float = 0.0
    ranking: float = 0.0
    searching: float = 0.0
    fb: float = 0.0
    now: Callable[[], float] = time.perf_counter


class OnProgress(Protocol):
    """Called as an adaptation goes; `percent` never falls."""

    def __call__(self, stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None: ...


class Progress:
    """Turns the fraction of a stage into a percentage of the whole, and keeps each stage's seconds."""

    def __init__(self, passes: int, on_progress: OnProgress) -> None:
        self._passes = passes
        self._on_progress = on_progress
        self._started = time.perf_counter()
        self._percent = 0.0
        self._pass = 0
        self.seconds: dict[Stage, float] = {}

    @contextmanager
    def stage(self, stage: Stage, message: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.tell(stage, 0.0, message)
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started

    def tell(self, stage: Stage, fraction: float, message: str) -> None:
        """Report a fraction of a stage outside the passes."""
        low, high = SPANS[stage]
        self._send(stage, low + (high - low) * fraction, message)

    def within_pass(self, stage: Stage, number: int, fraction: float, message: str) -> None:
        """Report a fraction of a stage of pass `number`, counted from 1."""
        done = fraction * BACKWARD_SHARE if stage is Stage.BACKWARD else BACKWARD_SHARE
        if stage is Stage.SEARCHING:
            done += fraction * (1 - BACKWARD_SHARE)
        low, high = PASSES_SPAN
        self._send(stage, low + (high - low) * (number - 1 + done) / self._passes, message)

    def _send(self, stage: Stage, percent: float, message: str) -> None:
        self._percent = max(self._percent, percent)
        elapsed = time.perf_counter() - self._started
        known = self._percent >= ETA_FROM_PERCENT
        eta = elapsed * (100 - self._percent) / self._percent if known else None
        self._on_progress(stage, round(self._percent, 1), eta, message)

    def cost(self, clock: Clock, out: Path) -> Cost:
        """Seconds and FB of each stage, memory, and what is to be shipped."""
        seconds = {
            **self.seconds,
            Stage.DECOMPOSING: self.seconds[Stage.DECOMPOSING] + clock.decomposing,
            Stage.BACKWARD: clock.backward,
            Stage.RANKING: clock.ranking,
            Stage.SEARCHING: clock.searching,
        }
        stages = {stage.value: seconds[stage] for stage in Stage if stage in seconds}
        adapting = clock.backward + clock.ranking + clock.searching
        return Cost(
            stages=stages,
            fb_seconds=clock.fb,
            adaptation_fb=adapting / clock.fb,
            stages_fb={stage: value / clock.fb for stage, value in stages.items()},
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
            adapter_bytes=folder_bytes(out / "adapter"),
            model_bytes=folder_bytes(out / "model"),
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

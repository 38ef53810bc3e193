"""Two plots: what a method gains for its cost, and how far the loss that is predicted for a plan can be relied on.

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers differ too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workers.benchmark.records import CandidateRow, Records, Row
from workers.benchmark.tables import label, mean, methods_of, metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
"""Two more than colours, so that none of the first 63 pairs is there twice."""
FREE = {"base": "--", "majority": ":"}
"""Methods without cost: a line, not a point on a logarithmic axis."""


# Of the reliability plot's axis. What is predicted to gain more than the loss itself several times over is not to be
# told apart any more.
FARTHEST_PREDICTION = 4.0


def write_plots(records: Records) -> None:
    """Write `accuracy_by_cost.png`, if a search tried anything `reliability.png`, and if a method removed structures
    down to a size `accuracy_by_size.png`."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `bench`; slow to import

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    draw_costs(figure.subplots(), records.rows())
    _save(figure, records.folder / "accuracy_by_cost.png")
    if any("@" in row.method for row in records.rows()):
        figure = Figure(figsize=(8, 6.6), layout="constrained")
        draw_sizes(figure.subplots(), records.rows())
        _save(figure, records.folder / "accuracy_by_size.png")
    candidates = records.candidates()
    if candidates:
        figure = Figure(figsize=(7, 6.5), layout="constrained")
        draw_reliability(figure.subplots(), candidates)
        _save(figure, records.folder / "reliability.png")


def draw_costs(axes: Axes, rows: Sequence[Row]) -> None:
    """Metric against FB: a small point for each task, its mean over seeds, and a large one for the mean over tasks."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    every = len({row.task for row in rows})
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for method in methods_of(rows):
        if "@" in method:  # of the other picture
            continue
        mine = [row for row in rows if row.method == method]
        tasks = sorted({row.task for row in mine})
        heights = [float(np.mean([metric(row) for row in mine if row.task == task])) for task in tasks]
        height = mean(mine, metric)
        if method in FREE:
            axes.axhline(height, color="0.4", linestyle=FREE[method], label=f"{label(method)} (mean, no cost)")
            continue
        colour, marker = next(styles)
        costs = [float(np.mean([row.fb for row in mine if row.task == task])) for task in tasks]
        axes.scatter(costs, heights, s=22, color=colour, marker=marker, alpha=0.45, linewidths=0)
        cost = mean(mine, lambda row: row.fb)
        # A mean over other tasks than the rest is not to be compared with theirs: it says of how many it is.
        named = label(method) if len(tasks) == every else f"{label(method)} ({len(tasks)} of {every} tasks)"
        axes.scatter([cost], [height], s=150, color=colour, marker=marker, edgecolors="black", label=named)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("cost of adapting, in forward-and-backward passes over the gradient split (FB)")
    axes.set_ylabel("test accuracy; exact match where there are no choices")
    axes.set_title("small: one task, mean over seeds; large: mean over tasks")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


@dataclass(frozen=True)
class _Fall:
    """Of a candidate's loss, as a part of the loss before the pass."""

    number: int
    chosen: bool
    predicted: float
    actual: float

    @classmethod
    def of(cls, candidate: CandidateRow, predicted_loss: float) -> _Fall:
        base = candidate.base_loss
        actual = (base - candidate.loss) / base
        return cls(candidate.number, candidate.chosen, (base - predicted_loss) / base, actual)


def draw_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    """Metric against the parameters that are left: a line for each way to get smaller, from the base at 1, over the
    cells that all of its sizes have."""
    ways: dict[str, list[str]] = {}
    for method in methods_of(rows):
        if "@" in method:
            ways.setdefault(method.partition("@")[0], []).append(method)
    for (way, methods), (colour, marker) in zip(
        ways.items(), zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False
    ):
        by_cell = [{(r.task, r.seed): r for r in rows if r.method == method} for method in methods]
        cells = set.intersection(*(set(mine) for mine in by_cell))
        if not cells:
            continue
        # What compresses removes components too: it is held against them, the others against the base.
        start = "components:8" if way.startswith("compress/") else "base"
        whole = [metric(r) for r in rows if r.method == start and (r.task, r.seed) in cells]
        points = [
            (
                float(np.mean([mine[cell].left or 0 for cell in cells])),
                float(np.mean([metric(mine[cell]) for cell in cells])),
            )
            for mine in by_cell
        ]
        points = sorted([*points, *([(1.0, float(np.mean(whole)))] if whole else [])])
        style = "-" if way.startswith("compress/") else "--"
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linestyle=style,
            label=f"{way} ({len(cells)} cell{'s' if len(cells) > 1 else ''})",
        )
    axes.invert_xaxis()
    axes.set_xlabel("parameters left, as a part of the base's")
    axes.set_ylabel("test accuracy; exact match where there are no choices")
    axes.set_title("structures removed: dashed without, solid with components removed after them")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def draw_reliability(axes: Axes, candidates: Sequence[CandidateRow]) -> None:
    """Predicted against actual fall in mean loss of every plan that first order says something of, in units of the
    loss before the pass."""
    falls = [_Fall.of(c, c.predicted_loss) for c in candidates if c.predicted_loss is not None]
    for later, name, colour, marker in (
        (False, "first pass", COLOURS[0], "o"),
        (True, "later passes", COLOURS[1], "s"),
    ):
        mine = [fall for fall in falls if (fall.number > 1) == later]
        if not mine:
            continue
        predicted, actual = [fall.predicted for fall in mine], [fall.actual for fall in mine]
        axes.scatter(predicted, actual, s=16, color=colour, marker=marker, alpha=0.5, linewidths=0, label=name)
    axes.scatter(
        [fall.predicted for fall in falls if fall.chosen],
        [fall.actual for fall in falls if fall.chosen],
        s=50,
        facecolors="none",
        edgecolors="black",
        label="accepted",
    )
    low, high = -1.0, FARTHEST_PREDICTION
    beyond = sum(fall.predicted > high or fall.actual < low for fall in falls)
    axes.plot([low, 1.0], [low, 1.0], color="0.4", linestyle="--", label="as predicted")
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_ylim(low, 1.05)
    axes.set_xlim(-0.1, high)
    axes.set_xlabel("predicted fall in loss, over the loss before the pass")
    axes.set_ylabel("actual fall, likewise")
    axes.set_title(f"{len(falls):,} plans tried on the selection split; {beyond:,} lie outside of the picture")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)


def _save(figure: Figure, path: Path) -> None:
    """A reader sees the old picture or the new one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        written = Path(folder) / path.name
        figure.savefig(written, dpi=150)
        written.replace(path)

"""What an adaptation looks like in a terminal: a bar while it runs, then the verdict, a table and a map.

Everything fits 80 columns and says the same without colour; where no terminal is, a step or a sentence is a line.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column, Table
from rich.text import Text

from service.curves import filled
from service.jobs import Difference
from service.reports import Cost, Metrics, Report
from service.sizes import size_rows

SHADES = "·░▒▓█"
ASCII_SHADES = ".:+*#"
COLOURS = ("dim", "cyan", "cyan", "bold cyan", "bold cyan")
WIDEST_MAP = 80


class Bar:
    """Where a job is. `show` is called as it goes."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._task = progress.add_task("queued", total=100, ends_at=None)

    def show(self, percent: float, message: str, eta_seconds: float | None = None) -> None:
        """One step."""
        if self._console.is_terminal:
            ends_at = None if eta_seconds is None else time.monotonic() + eta_seconds
            self._progress.update(self._task, completed=percent, description=message, ends_at=ends_at)
        else:
            print(f"{percent:5.1f} %  {message}", file=self._console.file, flush=True)


@contextmanager
def progress_bar(console: Console) -> Iterator[Bar]:
    """A bar at work; its line is gone afterwards, and whatever ends it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        _Times(table_column=Column(no_wrap=True, min_width=11)),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True, expand=console.width <= 100
    ) as progress:
        yield Bar(console, progress)


class _Times(ProgressColumn):
    """`1:04 -2:30`: since it is watched, and what is left by the job's own estimate."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("ends_at")
        shown = f" -{clock(max(0.0, left - time.monotonic()))}" if left is not None else ""
        return Text(f"{clock(task.elapsed or 0.0)}{shown}", style="cyan")


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def draw(report: Report, console: Console) -> None:
    """The verdict, the figures on the test split, where components were removed, and what it took."""
    prose = partial(console.print, soft_wrap=not console.is_terminal)  # a program gets a sentence a line
    prose(Text(report.verdict, style="bold"))
    console.print()
    console.print(_figures(report))
    if rows := size_rows(report):
        console.print()
        console.print(_sizes(rows))
    console.print()
    if report.curve:
        console.print(_curve(report))
        console.print()
    console.print(_map(report, console))
    console.print()
    prose(Text(_summary(report)))


def _figures(report: Report) -> Table:
    shown = [("base", report.base), ("one pass", report.after_first_pass), ("adapted", report.adapted)]
    if report.passes_requested == 1 or report.after_first_pass is None:
        del shown[1]
    names = [Column(name, justify="right") for name, _ in shown]
    table = Table(
        Column(""), *names, "difference", "95 % interval", Column("p", justify="right"), box=None, pad_edge=False
    )
    for name in ("accuracy", "exact_match", "loss"):
        values = [_figure(metrics, name) for _, metrics in shown]
        if any(values):
            difference = next((one for one in report.differences if one.metric == name), None)
            table.add_row(name.replace("_", " "), *values, *_interval(difference))
    return table


def _sizes(rows: list[list[str]]) -> Table:
    table = Table(*(Column(name, justify="right" if name else "left") for name in rows[0]), box=None, pad_edge=False)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _curve(report: Report) -> Table:
    """The base and what each round left, a line each."""
    (first, *columns), rows = filled(report)
    table = Table(first, *(Column(name, justify="right") for name in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _figure(metrics: Metrics | None, name: str) -> str:
    value = getattr(metrics, name) if metrics else None
    return "" if value is None else f"{value:.3f}"


def _interval(difference: Difference | None) -> tuple[str, ...]:
    if difference is None:
        return ("", "", "")
    return (f"{difference.value:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}", f"{difference.p:.2g}")


def _map(report: Report, console: Console) -> RenderableType:
    """Layers from left to right, kinds of modules from top to bottom; the darker, the more components are gone."""
    removed: Counter[str] = Counter()
    for entry in report.plan:
        removed[entry.module] += len(entry.components)
    if not removed and report.structures:
        kinds: Counter[str] = Counter()
        for structure in report.structures:
            kinds[structure.kind] += len(structure.indices)
        return Text(f"structures removed: {', '.join(f'{kind} {count:,}' for kind, count in kinds.items())}")
    if not removed:
        if report.removed.structures:
            return Text("No components were removed beside the structures.")
        return Text("Nothing was removed: the base model is what is returned.")
    layers = 1 + max(module.layer for module in report.modules)
    names = _labels(report)
    label = min(24, max(map(len, names.values())))
    room = min(console.width, WIDEST_MAP) - label - 8
    together = math.ceil(layers / room)
    wide = 2 if layers * 2 <= room else 1
    cells: dict[str, Counter[int]] = defaultdict(Counter)
    for module in report.modules:
        cells[module.kind][module.layer // together] += removed[module.module]
    columns = math.ceil(layers / together)
    shades = ASCII_SHADES if console.options.ascii_only else SHADES
    most = max(count for row in cells.values() for count in row.values())
    lines = [Text(f"{'layer':{label}} {_ruler(columns, together, wide)}", style="dim")]
    for name, shown in names.items():
        line = Text(f"{shown[-label:]:{label}} ")
        for column in range(columns):
            known = column in cells[name]
            level = _level(cells[name][column], most)
            line.append((shades[level] if known else " ") * wide, style=COLOURS[level])
        lines.append(line.append(f" {cells[name].total():>6,}"))
    return Group(*lines, Text(_legend(cells, most, shades, together), style="dim"))


def _labels(report: Report) -> dict[str, str]:
    """Each kind of module as the map calls it: `q_proj` for `self_attn.q_proj`, where no other kind ends alike."""
    kinds = dict.fromkeys(module.kind for module in report.modules)
    ends = Counter(kind.rpartition(".")[2] for kind in kinds)
    return {kind: end if ends[end := kind.rpartition(".")[2]] == 1 else kind for kind in kinds}


def _level(count: int, most: int) -> int:
    """0 for none, then 1 to 4 in equal steps of the logarithm."""
    return 1 + int(4 * math.log(count) / math.log1p(most)) if count else 0


def _ruler(columns: int, together: int, wide: int) -> str:
    """The numbers of the layers, every tenth column or every fifth."""
    step = 5 if columns <= 40 else 10
    text = ""
    for column in range(0, columns, step):
        text = f"{text:{column * wide}}{column * together}"
    return text


def _legend(cells: dict[str, Counter[int]], most: int, shades: str, together: int) -> str:
    found: dict[int, list[int]] = defaultdict(list)
    for count in (count for row in cells.values() for count in row.values()):
        found[_level(count, most)].append(count)
    parts = [f"{shades[0]} none"]
    for level in sorted(found.keys() - {0}):
        low, high = min(found[level]), max(found[level])
        parts.append(f"{shades[level]} {low:,}" + (f" to {high:,}" if high > low else ""))
    columns = f"; a column is {together} layers" if together > 1 else ""
    return f"components removed: {'   '.join(parts)}{columns}"


def _shipped(cost: Cost) -> str:
    what, size = ("adapter", cost.adapter_bytes) if cost.adapter_bytes else ("model", cost.model_bytes)
    return f"{what} {size / 1e6:.1f} MB"


def _summary(report: Report) -> str:
    cost = report.cost
    return "\n".join(
        [
            f"Of {report.adapted.n:,} test examples {report.gained:,} came right and {report.lost:,} went wrong; "
            f"{report.drift}.",
            f"Removed {report.removed.of(report.model.components)}, in "
            f"{report.removed.modules:,} of {report.model.target_modules:,} modules of {report.model.id}.",
            *report.shipped_words(),
            f"Adaptation {cost.adaptation_fb:.1f} FB of {cost.fb_seconds:.1f} s; all "
            f"{clock(sum(cost.stages.values()))}; peak memory {cost.peak_memory_bytes / 2**30:.1f} GiB; "
            f"{_shipped(cost)}.",
            report.outlook.message,
        ]
    ).rstrip()

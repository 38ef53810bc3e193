"""`results.md`: one table over all tasks, then one a task, made from `bench.json` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy import stats

from service.strategies import C2IOptions
from workers.benchmark.methods import C2I
from workers.benchmark.pooling import pooled
from workers.benchmark.records import Records, Row, Run, write_whole
from workers.evaluation import mcnemar_p

SIGNIFICANT = 0.05
LABELS = {
    "base": "base",
    "majority": "majority class",
    "fewshot": "few-shot prompting",
    "laser": "LASER",
    "c2i": "C2I",
    "lora": "LoRA",
}

NOTES = """\
Figures are of the test split, which no method has seen: the mean over tasks of a task's mean over seeds. A cell is one
task with one seed. *Metric* is accuracy over the choices; exact match where a task has none, marked with °. ± is the
standard deviation over the seeds that all tasks have, in the first table of the mean over tasks. *Gain* is over the
base on the same cells, *of LoRA's* that gain as a share of LoRA's on the cells that have both. *Better/worse*: tasks on
which the method differs from the base significantly, in the metric and in exact match (p < .05, McNemar's exact test,
two-sided, over the rows of all seeds; one that several test splits have counts once, by what most seeds say; of rows
measured before December 2026 it is not known, and each counts). Intervals: 95 %, Wilson, the rows of all seeds pooled;
one that several test splits have counts as often, which makes them a little narrow.
*Parameters* and *bytes* are those of the adapter. *Seconds* and *FB* are the cost of adapting, the test left out; a
second is one of all threads computing (processor time over threads), which other processes on the machine do not
lengthen. Few-shot prompting adapts nothing and pays with every answer: its cost is that of the test split behind the
context, to be held against the base's *test s*, the seconds of the test split. One FB is one forward and backward over
the gradient split, measured for each cell in the same run.
"""

SIZE_NOTES = """\
*Left* are the parameters that did not go with a structure, as a part of the base's; what follows FB is of the written
model over the base, both loaded and run in turns, where the model is really smaller; *energy* is that of a token, where
the machine tells it. `heads` and the like are one pass of the strategy, which removes what harms. `heads@0.9` removes
heads by effect until nine tenths of the parameters are left, `heads/michel@0.9` by that score, and nothing else;
`magnitude@0.9` the smallest entries of all weights, which makes no file smaller. `compress/layers@0.8` is a job of the
goal `compress`, which removes components too.
"""


@dataclass(frozen=True)
class Summary:
    """A method over all cells that it has rows for."""

    method: str
    cells: int
    metric: float
    spread: float | None
    """Over seeds, of the mean over tasks; None for one seed."""
    gain: float
    share_of_lora: float | None
    better: int
    worse: int
    exact_match: float
    exact_better: int
    exact_worse: int
    balanced_accuracy: float | None
    loss: float | None
    drift: float | None
    parameters: float
    bytes: float
    seconds: float
    fb: float
    test_seconds: float


def metric(row: Row) -> float:
    """Accuracy, of an open task exact match."""
    return row.exact_match if row.accuracy is None else row.accuracy


def label(method: str) -> str:
    """A method's name in tables and plots."""
    if method in LABELS:
        return LABELS[method]
    name, _, passes = method.partition(":")
    return f"{name}, {passes} pass" + ("" if passes == "1" else "es") if passes.isdecimal() else method


def methods_of(rows: Sequence[Row]) -> list[str]:
    """The methods that have rows, in the tables' order."""
    order = list(LABELS)
    return sorted({row.method for row in rows}, key=lambda m: (order.index(m) if m in order else len(order), m))


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Every method over all its cells, in the tables' order."""
    return [_summary(method, rows) for method in methods_of(rows)]


def _summary(method: str, rows: Sequence[Row]) -> Summary:
    mine = [row for row in rows if row.method == method]
    gains, lora = _gains(method, rows), _gains("lora", rows)
    over_base = [row for row in mine if (row.task, row.seed) in gains]
    both = [row for row in over_base if (row.task, row.seed) in lora]
    of_lora = mean(both, lambda row: lora[row.task, row.seed]) if both else 0.0
    tasks = sorted({row.task for row in mine})
    changes = [_directions([row for row in mine if row.task == task]) for task in tasks]
    return Summary(
        method=method,
        cells=len(mine),
        metric=mean(mine, metric),
        spread=_spread(mine, metric),
        gain=mean(over_base, lambda row: gains[row.task, row.seed]) if gains else float("nan"),
        share_of_lora=mean(both, lambda row: gains[row.task, row.seed]) / of_lora if of_lora > 0 else None,
        better=sum(change > 0 for change, _ in changes),
        worse=sum(change < 0 for change, _ in changes),
        exact_match=mean(mine, lambda row: row.exact_match),
        exact_better=sum(change > 0 for _, change in changes),
        exact_worse=sum(change < 0 for _, change in changes),
        balanced_accuracy=_mean_known(mine, lambda row: row.balanced_accuracy),
        loss=_mean_known(mine, lambda row: row.loss),
        drift=_mean_known(mine, lambda row: row.drift),
        parameters=mean(mine, lambda row: row.parameters_touched),
        bytes=mean(mine, lambda row: row.bytes),
        seconds=mean(mine, lambda row: row.seconds),
        fb=mean(mine, lambda row: row.fb),
        test_seconds=mean(mine, lambda row: row.test_seconds),
    )


def _gains(method: str, rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Of each cell that has the method and the base."""
    base = {(row.task, row.seed): metric(row) for row in rows if row.method == "base"}
    mine = {(row.task, row.seed): metric(row) for row in rows if row.method == method}
    return {cell: mine[cell] - base[cell] for cell in mine.keys() & base.keys()}


def _directions(rows: Sequence[Row]) -> tuple[int, int]:
    """Over the seeds of one task: 1 for significantly better than the base, -1 for worse, 0 for neither; in the
    metric and in exact match."""
    return _direction(*pooled(rows)), _direction(*pooled(rows, exact=True))


def _direction(gained: int, lost: int) -> int:
    return int(np.sign(gained - lost)) if mcnemar_p(gained, lost) < SIGNIFICANT else 0


def mean(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    """The mean over tasks of the mean over a task's seeds: a task counts once, of however many seeds it has rows."""
    tasks = {row.task for row in rows}
    return float(np.mean([np.mean([of(row) for row in rows if row.task == task]) for task in sorted(tasks)]))


def _mean_known(rows: Sequence[Row], of: Callable[[Row], float | None]) -> float | None:
    """`mean` of the rows that know it; None where none does."""
    known = [row for row in rows if of(row) is not None]
    return mean(known, lambda row: of(row) or 0.0) if known else None


def _spread(rows: Sequence[Row], of: Callable[[Row], float]) -> float | None:
    """Standard deviation over seeds of the mean over tasks, over the seeds that all of the tasks have; None where that
    is one."""
    tasks = {row.task for row in rows}
    by_seed = [[row for row in rows if row.seed == seed] for seed in sorted({row.seed for row in rows})]
    means = [mean(mine, of) for mine in by_seed if {row.task for row in mine} == tasks]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


# --- Markdown ---------------------------------------------------------------------------------------------------


def write_tables(records: Records, run: Run) -> None:
    """Write `results.md`."""
    write_whole(records.folder / "results.md", render(records.rows(), run))


def render(rows: Sequence[Row], run: Run) -> str:
    """The tables as Markdown."""
    tasks, seeds = sorted({row.task for row in rows}), sorted({row.seed for row in rows})
    gradient, selection, test = run.rows
    head = [
        f"# {run.model}: tasks {len(tasks)}, seeds {len(seeds)}",
        f"{_dates(rows, run)}; {gradient} gradient, {selection} selection and {test} test rows; objective "
        f"`{run.objective}`; model revision {run.revision[:12]}; {run.machine['processor']}, {run.machine['threads']} "
        f"threads, GPU: {run.machine['gpu']}; " + ", ".join(f"{name} {v}" for name, v in run.versions.items()) + ".",
    ]
    parts = [*head, "## All tasks", _overall(rows), NOTES + _sampled(rows)]
    smaller = [row for row in rows if row.left is not None and row.left < 1]
    if smaller:
        parts += ["## Smaller models", _sizes(smaller), SIZE_NOTES]
    for task in tasks:
        parts += [f"## {task}", _of_task([row for row in rows if row.task == task])]
    return "\n\n".join(parts) + "\n"


def _overall(rows: Sequence[Row]) -> str:
    header = (
        "method | cells | metric | gain | of LoRA's | better/worse | exact match | better/worse | balanced acc. | loss"
        " | drift | parameters | bytes | seconds | FB | test s"
    )
    return _table(header, [_overall_cells(summary) for summary in summarise(rows)])


def _overall_cells(s: Summary) -> list[str]:
    return [
        label(s.method),
        str(s.cells),
        _spread_out(s.metric, s.spread),
        f"{s.gain:+.3f}",
        "" if s.share_of_lora is None else f"{s.share_of_lora:.0%}",
        f"{s.better}/{s.worse}",
        f"{s.exact_match:.3f}",
        f"{s.exact_better}/{s.exact_worse}",
        _number(s.balanced_accuracy),
        _number(s.loss),
        _number(s.drift),
        f"{s.parameters:,.0f}",
        f"{s.bytes:,.0f}",
        f"{s.seconds:,.1f}",
        f"{s.fb:.1f}",
        f"{s.test_seconds:.1f}",
    ]


def _sizes(rows: Sequence[Row]) -> str:
    sizes = "file bytes | peak memory | prefill | decode | energy"
    header = f"method | cells | left | metric | exact match | loss | FB | {sizes}"
    return _table(header, [_size_cells([r for r in rows if r.method == method]) for method in methods_of(rows)])


def _size_cells(rows: Sequence[Row]) -> list[str]:
    sizes = (_mean_known(rows, attrgetter(name)) for name in ("model_bytes", "peak_memory"))
    speeds = (_mean_known(rows, attrgetter(name)) for name in ("prefill", "decode"))
    energy = _mean_known(rows, lambda row: row.energy)
    return [
        label(rows[0].method),
        str(len(rows)),
        _number(_mean_known(rows, lambda row: row.left)),
        _spread_out(mean(rows, metric), _spread(rows, metric)),
        f"{mean(rows, lambda row: row.exact_match):.3f}",
        _number(_mean_known(rows, lambda row: row.loss)),
        f"{mean(rows, lambda row: row.fb):.1f}",
        *("" if size is None else f"{size:.2f}" for size in sizes),
        *("" if speed is None else f"{speed:.2f} x" for speed in speeds),
        "" if energy is None else f"{energy:.2f}",
    ]


def _of_task(rows: Sequence[Row]) -> str:
    header = (
        "method | seeds | metric | 95 % | p | balanced acc. | exact match | loss | drift | parameters | bytes"
        " | seconds | FB | test s"
    )
    return _table(header, [_task_cells([r for r in rows if r.method == method]) for method in methods_of(rows)])


def _task_cells(rows: Sequence[Row]) -> list[str]:
    n = sum(row.n for row in rows)
    hits = sum(round(metric(row) * row.n) for row in rows)
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    mark = "°" if rows[0].accuracy is None else ""
    return [
        label(rows[0].method),
        str(len(rows)),
        _spread_out(mean(rows, metric), _spread(rows, metric), mark),
        f"{interval.low:.3f} to {interval.high:.3f}",
        f"{mcnemar_p(*pooled(rows)):.2g}",
        _number(_mean_known(rows, lambda row: row.balanced_accuracy)),
        _spread_out(mean(rows, lambda row: row.exact_match), _spread(rows, lambda row: row.exact_match)),
        _number(_mean_known(rows, lambda row: row.loss)),
        _number(_mean_known(rows, lambda row: row.drift)),
        f"{mean(rows, lambda row: row.parameters_touched):,.0f}",
        f"{mean(rows, lambda row: row.bytes):,.0f}",
        f"{mean(rows, lambda row: row.seconds):,.1f}",
        f"{mean(rows, lambda row: row.fb):.1f}",
        f"{mean(rows, lambda row: row.test_seconds):.1f}",
    ]


def _sampled(rows: Sequence[Row]) -> str:
    """For each method that tried a sample of its candidates: how many of how many, and what all would have taken."""
    lines = []
    if any(row.method == "c2i" for row in rows):
        usual = C2IOptions()
        lines.append(
            f"\nc2i tries {C2I.candidates} candidates a cell: {C2I.matrices} matrices, {len(C2I.retentions)} "
            f"retentions, {', '.join(map(str, C2I.row_blocks))} row blocks. A job tries {usual.candidates}: "
            f"{usual.matrices} matrices, {', '.join(map(str, usual.row_blocks))} blocks.\n"
        )
    for method in methods_of(rows):
        mine = [row for row in rows if row.method == method and row.tried and row.tried_of and row.tried < row.tried_of]
        if mine:
            hours = mean(mine, lambda row: row.seconds * (row.tried_of or 0) / (row.tried or 1)) / 3600
            fb = mean(mine, lambda row: row.fb * (row.tried_of or 0) / (row.tried or 1))
            lines.append(
                f"\n{label(method)} tried a seeded sample of {mine[0].tried:,} of its {mine[0].tried_of:,} candidates "
                f"a cell; all of them are extrapolated, not measured, to {hours:.1f} hours and {fb:,.0f} FB a cell.\n"
            )
    return "".join(lines)


def _dates(rows: Sequence[Row], run: Run) -> str:
    """The days on which rows were measured, the first and the last."""
    days = sorted({row.date or run.started[:10] for row in rows})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else run.started[:10]


def _table(header: str, body: Sequence[Sequence[str]]) -> str:
    columns = header.split(" | ")
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rule, *body])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spread_out(value: float, spread: float | None, mark: str = "") -> str:
    return f"{value:.3f}{mark}" if spread is None else f"{value:.3f}{mark} ± {spread:.3f}"

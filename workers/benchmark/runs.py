"""A run over tasks, seeds and methods that goes on where it was killed, several processes at a time if wanted."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from service.errors import C2IError, InternalError
from service.models import Model
from workers.benchmark.cells import OBJECTIVE, Bench, Cell, Encodings, encode_split, prepare
from workers.benchmark.methods import Measured, measure, units
from workers.benchmark.plots import write_plots
from workers.benchmark.records import Lines, Records, Row, Run
from workers.benchmark.tables import write_tables
from workers.benchmark.tasks import Sizes, Split, Task, split
from workers.evaluation import Outcome, mcnemar_p, metrics
from workers.loading import load
from workers.proposals import plural

PACKAGES = ("compress-to-impress", "torch", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True, eq=False)
class Pending:
    """A cell with methods that have no row yet."""

    task: str
    seed: int
    split: Split

    def left(self, records: Records, methods: Sequence[str]) -> list[str]:
        """Its methods without a row, by what stands on disk now."""
        there = {row.method for row in records.rows() if (row.task, row.seed) == (self.task, self.seed)}
        return [method for method in methods if method not in there]


def run(
    tasks: Sequence[Task],
    methods: Sequence[str],
    seeds: int,
    sizes: Sizes,
    model: Model,
    cache: Path,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Measure what is not measured yet, then write the tables and the plots.

    Args:
        seeds: how many: 0, 1, ...
        cache: the data folder's.
        say: told of every row as it is measured.

    Raises:
        InvalidInput: before anything is measured, what is wrong with the examples or with `out`.
        InternalError: at the end, naming what could not be measured and has no row; all else has.
    """
    for task in tasks:
        if task.contradicting:
            say(f"{task.name}: {plural(task.contradicting, 'row')} left out, whose prompt has another answer before")
    cells = [Pending(t.name, seed, split(t, seed, sizes, model.id)) for seed in range(seeds) for t in tasks]
    records = Records(out)
    records.open(
        Run(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            model=model.id,
            revision=model.revision,
            rows=sizes.each,
            objective=OBJECTIVE.value,
            tasks={task.name: task.digest for task in tasks},
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            machine=_machine(),
        )
    )
    pending = [cell for cell in cells if cell.left(records, methods)]
    failed: list[str] = []
    if pending:
        say(f"loading {model.id}")
        base = load(model.folder)
        encodings = {id(cell): encode_split(base, cell.split, model.context_length) for cell in pending}
        bench = Bench.prepare(model, base, cache)
        clock = _Clock([unit for cell in pending for unit in units(cell.left(records, methods))])
        for cell in _claimed(records, pending):
            for failure in _measure_cell(cell, bench, encodings[id(cell)], records, methods, clock, say):
                say(failure)
                failed.append(failure)
            write_tables(records, records.run())
    write_tables(records, records.run())
    write_plots(records)
    say(f"{len(records.rows())} rows in {out / 'bench.json'}; tables in {out / 'results.md'}")
    if failed:
        raise InternalError(f"{len(failed)} not measured, the same command tries them again: {'; '.join(failed)}")


def _claimed(records: Records, cells: Sequence[Pending]) -> Iterator[Pending]:
    """Every cell, while this process holds it. One that another process is at comes after all others."""
    put_off = []
    for cell in cells:
        with records.claim(cell.task, cell.seed, wait=False) as mine:
            if mine:
                yield cell
            else:
                put_off.append(cell)
    for cell in put_off:
        with records.claim(cell.task, cell.seed, wait=True):
            yield cell


def _measure_cell(
    pending: Pending,
    bench: Bench,
    rows: Encodings,
    records: Records,
    methods: Sequence[str],
    clock: _Clock,
    say: Callable[[str], None],
) -> Iterator[str]:
    """Measure what is left of a cell; gives what failed, in words, and goes on with the next."""
    todo = units(pending.left(records, methods))
    if not todo:  # another process did it
        return
    there = [row for row in records.rows() if (row.task, row.seed) == (pending.task, pending.seed)]
    name = f"{pending.task} seed {pending.seed}"
    try:
        cell = prepare(bench, pending.task, pending.seed, rows, there[0].fb_seconds if there else None)
    except Exception as error:
        yield f"{name}: {_reason(error)}"
        return
    for unit in todo:
        started = time.perf_counter()
        missing = list(unit)
        try:
            for found in measure(cell, unit, pending.split.gradient):
                new = [make_row(cell, method, measured) for method, measured in found.by_method.items()]
                records.add(new, found.candidates)
                for row in new:
                    missing.remove(row.method)
                    say(_line(row))
        except Exception as error:
            yield f"{name} {', '.join(missing)}: {_reason(error)}"
        say(clock.done(unit, time.perf_counter() - started))


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, C2IError) else f"{type(error).__name__}: {error}"


def make_row(cell: Cell, method: str, measured: Measured) -> Row:
    """The row of a method on a cell."""
    finite = np.isfinite(measured.outcome.loss)  # a majority has no loss, a broken model an infinite one
    found = metrics(replace(measured.outcome, loss=np.where(finite, measured.outcome.loss, 0.0)), cell.rows.test)
    lines = _changed_lines(cell, measured.outcome)
    gained, lost = len(lines.gained), len(lines.lost)
    exact_gained, exact_lost = len(lines.exact_gained), len(lines.exact_lost)
    hits, size = measured.outcome.right[_counted(measured.outcome)], measured.size
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return Row(
        task=cell.task,
        method=method,
        seed=cell.seed,
        accuracy=found.accuracy,
        exact_match=found.exact_match,
        balanced_accuracy=found.balanced_accuracy,
        loss=found.loss if finite.all() else None,
        low=float(interval.low),
        high=float(interval.high),
        p=mcnemar_p(gained, lost),
        parameters_touched=measured.parameters,
        bytes=measured.bytes,
        seconds=measured.seconds,
        fb=measured.seconds / cell.fb_seconds,
        fb_seconds=cell.fb_seconds,
        drift=measured.drift,
        passes=measured.passes,
        components=measured.components,
        n=len(hits),
        gained=gained,
        lost=lost,
        exact_n=found.n,
        exact_gained=exact_gained,
        exact_lost=exact_lost,
        exact_p=mcnemar_p(exact_gained, exact_lost),
        lines=lines,
        test_seconds=measured.test_seconds,
        tried=measured.tried,
        tried_of=measured.tried_of,
        note=measured.note,
        left=measured.left,
        model_bytes=size.bytes if size else None,
        peak_memory=size.peak_memory if size else None,
        prefill=size.prefill if size else None,
        decode=size.decode if size else None,
        energy=size.energy if size else None,
        date=datetime.now(UTC).date().isoformat(),
    )


def _counted(outcome: Outcome) -> npt.NDArray[np.bool_]:
    """The rows that the metric is over: those with choices, or all where none has any."""
    closed = ~np.isnan(outcome.correct)
    return closed if closed.any() else ~closed


def _changed_lines(cell: Cell, outcome: Outcome) -> Lines:
    """Where the rows stand in the task's file that the model has right and the base wrong, and the other way round."""
    lines, counted = np.array(cell.rows.test_lines), _counted(outcome)
    change, exact_change = outcome.right - cell.base.right, outcome.exact - cell.base.exact
    return Lines(
        gained=lines[counted & (change > 0)].tolist(),
        lost=lines[counted & (change < 0)].tolist(),
        exact_gained=lines[exact_change > 0].tolist(),
        exact_lost=lines[exact_change < 0].tolist(),
    )


def _line(row: Row) -> str:
    metric, value = ("exact match", row.exact_match) if row.accuracy is None else ("accuracy", row.accuracy)
    return f"{row.task} seed {row.seed} {row.method}: {metric} {value:.3f}, {row.seconds:.1f} s, {row.fb:.1f} FB"


class _Clock:
    """Estimates the time that is left, each unit of work by the mean of its like."""

    def __init__(self, planned: Sequence[Sequence[str]]) -> None:
        self.planned = [tuple(unit) for unit in planned]
        self.total = len(self.planned)
        self.seconds: dict[tuple[str, ...], list[float]] = {}

    def done(self, unit: Sequence[str], seconds: float) -> str:
        """Note a unit done, and say what is left."""
        name = tuple(unit)
        if name in self.planned:
            self.planned.remove(name)
        self.seconds.setdefault(name, []).append(seconds)
        every = [s for seconds_of in self.seconds.values() for s in seconds_of]
        left = sum(float(np.mean(self.seconds.get(u, every))) for u in self.planned)
        return f"{self.total - len(self.planned)} of {self.total}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _machine() -> dict[str, str | int]:
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "system": platform.platform(),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }

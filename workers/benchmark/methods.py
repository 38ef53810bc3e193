"""The methods by name: each takes a cell and gives what it reached on the test split, and at what cost."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from service.errors import InvalidInput
from service.jobs import Example, Stage
from service.reports import PassReport
from service.strategies import C2IOptions, LaserOptions
from workers.benchmark import compressed, fewshot, lora, structures
from workers.benchmark.cells import OBJECTIVE, Cell
from workers.benchmark.clock import now
from workers.benchmark.records import CandidateRow
from workers.checkpoints import write_adapter
from workers.evaluation import Outcome, evaluate
from workers.examples import Encoded
from workers.progress import folder_bytes
from workers.ranking import Plan
from workers.search import Search
from workers.strategies import make_search
from workers.subject import Subject, Track

SIMPLE = ("base", "majority", "fewshot", "lora")
GRIDS = ("laser", "c2i")
# Of LASER's grid, which has 1,470 candidates for a model of 30 layers.
LASER_SAMPLE = 200
# 72 candidates: the whole grid of the strategy's defaults takes 200.
C2I = C2IOptions(matrices=3, row_blocks=(1, 4, 16))
COMPONENTS = re.compile(r"components:([1-8])")


@dataclass(frozen=True, eq=False)
class Measured:
    """One method on one cell. Fields as in `records.Row`."""

    outcome: Outcome
    """On the test split; loss NaN where there is none."""
    test_seconds: float
    seconds: float = 0.0
    parameters: int = 0
    bytes: int = 0
    drift: float | None = None
    passes: int | None = None
    components: int | None = None
    tried: int | None = None
    tried_of: int | None = None
    note: str | None = None
    left: float | None = None
    size: compressed.Size | None = None


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one unit of work gave: its methods by name, and the candidates that its search tried."""

    by_method: dict[str, Measured]
    candidates: list[CandidateRow] = field(default_factory=list)


def parse_methods(text: str) -> list[str]:
    """`base,lora,components:8` as a list, the base first: every p is against it.

    Raises:
        InvalidInput: naming a method that is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*SIMPLE, *GRIDS) and not COMPONENTS.fullmatch(name) and structures.parse(name) is None:
            known = ", ".join((*SIMPLE, *GRIDS))
            removing = ", ".join(structures.VARIANTS)
            raise InvalidInput(
                f"no method {name}; there are {known}, components:1 to components:8, and of structures {removing}",
                param="methods",
            )
    return list(dict.fromkeys(["base", *names]))


def units(methods: Sequence[str]) -> list[list[str]]:
    """Methods that are measured in one go: all numbers of passes are one search."""
    searched = sorted((m for m in methods if COMPONENTS.fullmatch(m)), key=passes_of)
    found = [[m] for m in methods if not COMPONENTS.fullmatch(m)]
    return [*found, searched] if searched else found


def measure(cell: Cell, unit: Sequence[str], gradient: Sequence[Example]) -> Iterator[Measurement]:
    """Run one unit of methods, and give each as soon as it is measured.

    Args:
        gradient: the gradient split's examples as text.
    """
    name = unit[0]
    if COMPONENTS.fullmatch(name):
        yield from components(cell, [passes_of(method) for method in unit])
    elif name == "base":
        yield Measurement({name: Measured(cell.base, cell.base_seconds, drift=0.0)})
    elif name == "majority":
        yield Measurement({name: Measured(majority(cell), 0.0)})
    elif name == "fewshot":
        yield Measurement({name: _fewshot(cell, gradient)})
    elif name == "lora":
        yield Measurement({name: _lora(cell)})
    elif method := structures.parse(name):
        yield remove_structures(cell, name, method)
    else:
        yield grid_search(cell, name)


def passes_of(method: str) -> int:
    """8 of `components:8`."""
    return int(method.rpartition(":")[2])


def majority(cell: Cell) -> Outcome:
    """Always the gradient split's most frequent answer; the first among equals."""
    counts = Counter(row.labels[row.gold] for row in cell.rows.gradient)
    answer = counts.most_common(1)[0][0]
    rows = cell.rows.test
    right = np.array([row.labels[row.gold] == answer for row in rows], dtype=float)
    # Where the answer is no choice of the row, some wrong one stands for it.
    predicted = [row.labels.index(answer) if answer in row.labels else (row.gold + 1) % len(row.labels) for row in rows]
    closed = np.array([row.closed for row in rows], dtype=bool)
    return Outcome(
        loss=np.full(len(rows), np.nan),
        exact=right,
        predicted=np.array(predicted, dtype=np.int64),
        correct=np.where(closed, right, np.nan),
    )


def _fewshot(cell: Cell, examples: Sequence[Example]) -> Measured:
    found = fewshot.prompt_with_examples(cell, examples)
    note = f"{found.shots} examples, {'context run once' if found.cached else 'context run with every row'}"
    return Measured(found.outcome, found.seconds, seconds=found.seconds, drift=0.0, note=note)


def _lora(cell: Cell) -> Measured:
    found = lora.train(cell)
    selection = ", ".join(f"{loss:.3f}" for loss in found.selection_losses)
    return Measured(
        found.outcome,
        found.test_seconds,
        seconds=found.seconds,
        parameters=found.parameters,
        bytes=found.bytes,
        passes=found.epoch,
        drift=found.drift,
        note=f"selection loss of the base and after each epoch: {selection}",
    )


def components(cell: Cell, passes: Sequence[int]) -> Iterator[Measurement]:
    """One search of as many passes as the most asked for. After K of them it stands where a search of K passes ends,
    to the bit, so that it answers for fewer too, as soon as it is there.

    Args:
        passes: ascending.
    """
    pool, track = _pool(cell)
    search = Search(cell.subject, pool, [track], track)
    search.clock.now = now
    tested: dict[int, Measured] = {}
    candidates: list[CandidateRow] = []
    left = list(passes)
    spent, started = 0.0, now()
    for report in search.each_pass(left[-1], _silent):
        # Of the first, with the judging of the base; the tests between passes are no part of it.
        spent += report.seconds if spent else now() - started
        candidates += _candidates(cell, "components", report)
        ended = not report.accepted
        while left and (ended or left[0] == report.number):
            asked = left.pop(0)
            k = search.result_after(asked)
            if k not in tested:
                tested[k] = _removal(cell, cell.subject, search.plans[k], k)
            yield Measurement({f"components:{asked}": replace(tested[k], seconds=spent)}, candidates)


def _removal(cell: Cell, subject: Subject, plan: Plan, passes: int) -> Measured:
    """A plan on the test split, and the adapter that it is.

    Args:
        subject: knows the row blocks that the plan touches.
    """
    started = now()
    with subject.without(plan):
        outcome = evaluate(subject.model, cell.rows.test, OBJECTIVE, cell.layout)
    test_seconds = now() - started
    parameters = size = 0
    if plan.size and not plan.structures:  # those are shipped as a model
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "adapter"
            masked = cell.bench.base.masked
            write_adapter(folder, cell.bench.model.id, subject.targets, subject.spectra, plan, masked=masked)
            size = folder_bytes(folder)
            parameters = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    return Measured(
        outcome,
        test_seconds,
        parameters=parameters,
        bytes=size,
        drift=cell.bench.neutral.drift(plan, subject),
        passes=passes,
        components=plan.size,
        left=structures.left(subject, plan),
    )


def _candidates(cell: Cell, method: str, report: PassReport) -> list[CandidateRow]:
    return [
        CandidateRow(
            task=cell.task,
            seed=cell.seed,
            method=method,
            number=report.number,
            size=candidate.size,
            examples=candidate.examples,
            base_loss=candidate.base_loss,
            predicted_loss=candidate.predicted_loss,
            loss=candidate.loss,
            chosen=report.accepted and (candidate.size, candidate.loss) == (report.chosen, report.loss),
        )
        for candidate in report.candidates
        if candidate.loss is not None
    ]


def grid_search(cell: Cell, strategy: str) -> Measurement:
    """`laser` and `c2i`, one pass: the plan that they take, and their candidates. LASER tries a seeded sample of its
    grid (`tried` of `tried_of`)."""
    options = LaserOptions(sample=LASER_SAMPLE) if strategy == "laser" else C2I
    pool, track = _pool(cell)
    search = make_search(cell.subject, pool, [track], track, options, cell.seed)
    search.clock.now = now
    started = now()
    search.run(1, _silent)
    seconds = now() - started
    (report,) = search.passes
    measured = _removal(cell, search.subject, search.plans[-1], int(report.accepted))
    tried = len(report.candidates)
    grid = len(cell.bench.targets) * len(options.retentions) if isinstance(options, LaserOptions) else tried
    note = report.reason
    measured = replace(measured, seconds=seconds, tried=tried, tried_of=max(grid, tried), note=note)
    return Measurement({strategy: measured}, _candidates(cell, strategy, report))


def remove_structures(cell: Cell, name: str, method: structures.Method) -> Measurement:
    """One pass of a strategy of structures, or its first structures down to a size."""
    subject = structures.subject_with(cell, method)
    if isinstance(method, structures.Compress):
        return Measurement({name: _compressed(cell, subject, method)})
    if isinstance(method, structures.ToSize):
        plan, seconds = structures.plan_to_size(cell, subject, method)
        return Measurement({name: replace(_removal(cell, subject, plan, 0), seconds=seconds)})
    pool, track = _pool(cell)
    search = make_search(subject, pool, [track], track, method.options, cell.seed)
    search.clock.now = now
    started = now()
    search.run(1, _silent)
    seconds = now() - started
    k = search.result_after(1)
    measured = replace(_removal(cell, search.subject, search.plans[k], k), seconds=seconds)
    return Measurement({name: measured}, _candidates(cell, name, search.passes[0]))


def _compressed(cell: Cell, subject: Subject, method: structures.Compress) -> Measured:
    pool, track = _pool(cell)
    search = Search(subject, pool, [track], track)
    search.clock.now = now
    bench = cell.bench
    plan, seconds = compressed.compress(search, method.options, method.size, bench.base, bench.model.parameters)
    size = compressed.written_size(bench.base, search.subject, plan)
    measured = _removal(cell, search.subject, plan, len(search.passes))
    return replace(measured, seconds=seconds, size=size)


def _pool(cell: Cell) -> tuple[list[Encoded], Track]:
    """The rows of both splits, and the way through them: ranked by the one, judged on the other."""
    pool = [*cell.rows.gradient, *cell.rows.selection]
    n = len(cell.rows.gradient)
    return pool, Track(list(range(n)), list(range(n, len(pool))))


def _silent(stage: Stage, number: int, fraction: float, message: str) -> None:
    pass

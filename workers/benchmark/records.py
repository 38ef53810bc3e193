"""What a run keeps on disk: `run.json`, `bench.json`, `candidates.json`.

A file is always whole: it is written aside and renamed. Two processes may work on one folder: who changes a file
holds its lock and reads it again first, and who measures a cell, one task with one seed, holds the cell's lock.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from service.errors import InvalidInput
from service.strict import Strict

T = TypeVar("T")


class Lines(Strict):
    """Test rows that the method has right and the base wrong, and the other way round, in the metric and in exact
    match: their lines in the task's file."""

    gained: list[int]
    lost: list[int]
    exact_gained: list[int]
    exact_lost: list[int]


class Row(Strict):
    """One method on one task with one seed. Figures are of the test split; `accuracy` is over the choices, null
    where no example has any. The metric below is accuracy, of an open task exact match."""

    task: str
    method: str
    seed: int
    accuracy: float | None
    exact_match: float
    balanced_accuracy: float | None
    loss: float | None
    low: float
    high: float
    """95 % interval of the metric (Wilson)."""
    p: float
    """Of the metric against the base on the same rows: McNemar's exact test, two-sided."""
    parameters_touched: int
    """Numbers that the adapter holds: r (m + n) for each m x n weight that is changed by a matrix of rank r. 0 where
    structures are removed, which are shipped as a model."""
    bytes: int
    """Of the adapter's files, likewise."""
    seconds: float
    """To adapt: without the test, but for few-shot prompting, which has no other cost."""
    fb: float
    """The same in FB."""
    fb_seconds: float
    """One FB: a forward and backward over the gradient split, without hooks; one measurement a task and seed."""
    drift: float | None = None
    passes: int | None = None
    """Accepted passes; of LoRA the epochs of the chosen state; null where there are none."""
    components: int | None = None
    """Components and structures removed."""
    n: int
    """Test rows that the metric is over."""
    gained: int
    lost: int
    """Rows that the method has right and the base wrong, and the other way round: in the metric."""
    exact_n: int
    """All test rows."""
    exact_gained: int
    exact_lost: int
    """The same in exact match."""
    exact_p: float
    lines: Lines | None = None
    """Which rows those are."""
    test_seconds: float
    """To evaluate the test split."""
    tried: int | None = None
    tried_of: int | None = None
    """Candidates judged of how many the strategy has, where it is sampled."""
    note: str | None = None
    left: float | None = None
    """Parameters that are not removed with a structure, as a fraction of the base's."""
    model_bytes: float | None = None
    """Of the weight files of a model that is really smaller, over the base's, as the others are that follow."""
    peak_memory: float | None = None
    prefill: float | None = None
    decode: float | None = None
    """Tokens a second; the base is measured in the same run."""
    energy: float | None = None
    """Joules for a token, where the machine tells."""
    date: str | None = None
    """The day it was measured on."""


class CandidateRow(Strict):
    """One plan that a search tried; losses as in a job's report."""

    task: str
    seed: int
    method: str
    number: int
    """Of the pass."""
    size: int
    examples: int
    base_loss: float
    predicted_loss: float | None
    loss: float
    chosen: bool


class Run(Strict):
    """What all rows of a folder have in common."""

    started: str
    model: str
    revision: str
    rows: tuple[int, int, int]
    objective: str
    tasks: dict[str, str]
    """sha256 of each task's file."""
    versions: dict[str, str]
    machine: dict[str, str | int]


RUN = TypeAdapter(Run)
ROWS = TypeAdapter(list[Row])
CANDIDATES = TypeAdapter(list[CandidateRow])


class Records:
    """A run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, run: Run) -> None:
        """Begin a run, or go on with the one that is there.

        Raises:
            InvalidInput: what is there was measured with other rows, another model or other task files, or is no run.
        """
        path = self.folder / "run.json"
        if (
            self.folder.exists()
            and not path.exists()
            and any(not p.name.startswith(".") for p in self.folder.iterdir())
        ):
            raise InvalidInput(f"{self.folder} holds other files and no run.json; name a new folder", param="out")
        with self._locked("files"):
            if not path.exists():
                write_whole(path, run.model_dump_json(indent=2))
                return
            there = self.run()
            for name in ("model", "revision", "rows", "objective"):
                old, new = getattr(there, name), getattr(run, name)
                if old != new:
                    raise InvalidInput(
                        f"{self.folder} was measured with {name} {_shown(old)}, not {_shown(new)}; name a new folder",
                        param="model" if name == "revision" else name if name != "objective" else "out",
                    )
            measured = {row.task for row in self.rows()}
            for task, digest in run.tasks.items():
                if task in measured and there.tasks.get(task, digest) != digest:
                    raise InvalidInput(
                        f"{task}.jsonl is not the file that {self.folder} was measured on; name a new folder",
                        param="data",
                    )
            merged = there.model_copy(update={"tasks": {**there.tasks, **run.tasks}})
            write_whole(path, merged.model_dump_json(indent=2))

    def run(self) -> Run:
        """What the folder's rows have in common, with the tasks of all who worked on it."""
        return self._read("run.json", RUN)

    def rows(self) -> list[Row]:
        """All rows measured so far, by whatever process."""
        return self._read("bench.json", ROWS) if (self.folder / "bench.json").exists() else []

    def candidates(self) -> list[CandidateRow]:
        """All candidates tried so far."""
        return self._read("candidates.json", CANDIDATES) if (self.folder / "candidates.json").exists() else []

    def _read(self, name: str, adapter: TypeAdapter[T]) -> T:
        path = self.folder / name
        try:
            return adapter.validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidInput(
                f"{path} is damaged or of another version ({error.errors()[0]['msg']}); name a new folder", param="out"
            ) from None

    def add(self, rows: Sequence[Row], candidates: Sequence[CandidateRow] = ()) -> None:
        """Add what was measured. Rows come last: where they are, their candidates are."""
        with self._locked("files"):
            if candidates:
                new = {(c.task, c.seed, c.method) for c in candidates}
                kept = [c for c in self.candidates() if (c.task, c.seed, c.method) not in new]
                write_whole(self.folder / "candidates.json", _lines([*kept, *candidates]))
            have = self.rows()
            names = {(row.task, row.seed, row.method) for row in have}
            have += [row for row in rows if (row.task, row.seed, row.method) not in names]
            write_whole(self.folder / "bench.json", _lines(have))

    @contextmanager
    def claim(self, task: str, seed: int, *, wait: bool) -> Iterator[bool]:
        """Hold a cell for the length of the context; False if another process has it and `wait` is not asked for."""
        with self._locked(f"{task}-{seed}", wait=wait) as mine:
            yield mine

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Iterator[bool]:
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file, or the end of the process, unlocks


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _lines(values: Sequence[Strict]) -> str:
    """A JSON list with one value a line."""
    return "[\n" + ",\n".join(value.model_dump_json() for value in values) + "\n]\n"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

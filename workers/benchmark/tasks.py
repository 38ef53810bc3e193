"""Task files: one JSONL of examples a task, shuffled by seed and cut into the three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from service import example_files, jsonl
from service.errors import InvalidInput
from service.jobs import Example, JobSpec

SPLITS = ("examples", "validation", "test")
"""The gradient, selection and test split, by the names that a job has for them."""


@dataclass(frozen=True)
class Sizes:
    """Rows of each split."""

    gradient: int
    selection: int
    test: int

    @property
    def each(self) -> tuple[int, int, int]:
        """In the order of `SPLITS`."""
        return self.gradient, self.selection, self.test


@dataclass(frozen=True, eq=False)
class Task:
    """One file. A prompt that stands in it twice with the same choices counts once, with its first answer."""

    name: str
    lines: jsonl.JsonLines
    digest: str
    """sha256 of the file."""
    contradicting: int
    """Rows left out because their prompt has another answer in an earlier row, which a job refuses."""


@dataclass(frozen=True, eq=False)
class Split:
    """A task's three splits for one seed."""

    gradient: list[Example]
    selection: list[Example]
    test: list[Example]
    files: dict[str, jsonl.JsonLines]
    """Where each split's rows stand in the file, by the names of `SPLITS`."""


def find_tasks(folder: Path, names: Sequence[str] | None) -> list[Task]:
    """Read `NAME.jsonl` for each name, all of the folder's if None.

    Raises:
        InvalidInput: the folder has no such file, or a line of one is not JSON.
    """
    # A hidden file is no task: some systems lay one of their own beside each.
    there = sorted(path.stem for path in folder.glob("*.jsonl") if not path.name.startswith("."))
    if not there:
        raise InvalidInput(f"{folder} has no *.jsonl files; a task is one file of examples", param="data")
    unknown = sorted(set(names or ()) - set(there))
    if unknown:
        raise InvalidInput(f"there is no {unknown[0]}.jsonl in {folder}; there are {', '.join(there)}", param="tasks")
    return [_read(folder / f"{name}.jsonl") for name in dict.fromkeys(names or there)]


def _read(path: Path) -> Task:
    read = example_files.read(path)
    seen: dict[str, int] = {}
    first = [seen.setdefault(_question(row), i) for i, row in enumerate(read.objects)]
    answers = [row.get("completion") if isinstance(row, dict) else None for row in read.objects]
    contradicting = sum(answers[i] != answers[j] for i, j in enumerate(first))
    kept = list(seen.values())
    lines = jsonl.JsonLines(str(path), [read.objects[i] for i in kept], [read.lines[i] for i in kept])
    return Task(path.stem, lines, sha256(path.read_bytes()).hexdigest(), contradicting)


def _question(row: object) -> str:
    """What two rows that ask the same have in common, by the rule of `service.jobs.check_examples`; of a row that no
    job takes, all of it."""
    if not isinstance(row, dict) or "prompt" not in row:
        return repr(row)
    choices = row.get("choices") or []
    asked = sorted(map(repr, choices)) if isinstance(choices, list) else choices
    return repr((row["prompt"], asked, row.get("turns") or []))


def split(task: Task, seed: int, sizes: Sizes, model: str) -> Split:
    """The first rows of the file's permutation by `seed`, checked by the rules of a job.

    Raises:
        InvalidInput: too few rows, or the file and line of an example that a job would refuse.
    """
    total = sum(sizes.each)
    available = len(task.lines.objects)
    if total > available:
        raise InvalidInput(f"{total:,} rows are asked for; {task.lines.name} has {available:,} different", param="rows")
    order: list[int] = np.random.default_rng(seed).permutation(available)[:total].tolist()
    files: dict[str, jsonl.JsonLines] = {}
    start = 0
    for name, size in zip(SPLITS, sizes.each, strict=True):
        mine = order[start : start + size]
        files[name] = jsonl.JsonLines(
            task.lines.name, [task.lines.objects[i] for i in mine], [task.lines.lines[i] for i in mine]
        )
        start += size
    try:
        spec = JobSpec.parse({"model": model, "seed": seed, **{name: file.objects for name, file in files.items()}})
    except InvalidInput as error:
        raise jsonl.locate(error, files) from None
    return Split(spec.examples, spec.validation or [], spec.test or [], files)

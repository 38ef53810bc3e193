"""`c2i adapt`: an adaptation without the service, on examples from a file, into a new folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from service import example_files, jsonl, models
from service.errors import InvalidInput
from service.jobs import JobSpec, Stage
from service.reports import Report
from service.settings import Settings
from service.terminal import draw, progress_bar
from workers.adaptation import adapt

Rows = tuple[int | None, int, int | None]


def run(file: Path, fields: dict[str, object], out: Path, settings: Settings, *, rows: Rows, as_json: bool) -> None:
    """Adapt, write the artifacts to `out`, and print the report.

    Args:
        fields: of the job, but its examples.
        rows: how many rows of the file, from its first, are for gradient, selection and test; a first of None
            leaves the division to the job's own splits.

    Raises:
        InvalidInput: naming what is wrong with the file or an option.
    """
    if out.exists():
        raise InvalidInput(f"{out} exists already; name a new folder", param="out")
    lines = example_files.read(file)
    try:
        spec = JobSpec.parse({**fields, **_divide(lines.objects, rows)})
    except InvalidInput as error:
        raise _locate(error, lines, rows) from None
    model = models.resolve(settings.models, spec.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    # What has the name `out` is whole.
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        report = _adapt(spec, model, staging, settings.cache)
        staging.chmod(0o755)
        staging.rename(out)
    except InvalidInput as error:
        raise _locate(error, lines, rows) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        draw(report, Console())
        print(f"Written to {out}")


def _adapt(spec: JobSpec, model: models.Model, out: Path, cache: Path) -> Report:
    with progress_bar(Console(stderr=True)) as bar:

        def on_progress(stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None:
            bar.show(percent, f"{stage.value}: {message}", eta_seconds)

        return adapt(spec, model, out, cache=cache, on_progress=on_progress)


def _divide(examples: list[object], rows: Rows) -> dict[str, list[object]]:
    gradient, selection, test = rows
    if gradient is None:
        if selection or test is not None:
            raise InvalidInput("--selection and --test count on from --gradient; give all three", param="gradient")
        return {"examples": examples}
    if min(gradient, selection, test or 0) < 0:
        raise InvalidInput("--gradient, --selection and --test are numbers of rows", param="gradient")
    end = gradient + selection
    last = max(end, len(examples)) if test is None else end + test
    if last > len(examples):
        raise InvalidInput(f"{last:,} rows are asked for; the file has {len(examples):,}", param="test")
    divided = {"examples": examples[:gradient], "validation": examples[gradient:end], "test": examples[end:last]}
    return {name: split for name, split in divided.items() if split or name == "examples"}


def _locate(error: InvalidInput, lines: jsonl.JsonLines, rows: Rows) -> InvalidInput:
    """The error with its line of the file: each split begins where the one before it ends."""
    gradient, selection, _ = rows
    starts = {"examples": 0, "validation": gradient or 0, "test": (gradient or 0) + selection}
    files = {
        name: jsonl.JsonLines(lines.name, lines.objects[start:], lines.lines[start:]) for name, start in starts.items()
    }
    return jsonl.locate(error, files)

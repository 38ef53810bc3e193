"""`c2i adapt`: an adaptation without the service, on examples from a file, into a new folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from service import jsonl, models
from service.errors import InvalidInput
from service.jobs import JobSpec, Stage
from service.reports import Metrics, Report
from service.settings import Settings
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
    lines = jsonl.read(file)
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
    typer.echo(report.model_dump_json(indent=2) if as_json else summary(report, out))


def _adapt(spec: JobSpec, model: models.Model, out: Path, cache: Path) -> Report:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=100)

        def on_progress(stage: Stage, percent: float, eta_seconds: float | None, message: str) -> None:
            bar.update(task, completed=percent, description=message)

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


def summary(report: Report, out: Path) -> str:
    """The verdict and a small table."""
    shown = [("base", report.base), ("after one pass", report.after_first_pass), ("returned", report.adapted)]
    lines = [report.verdict, "", f"{'':16}{'accuracy':>10}{'exact match':>13}{'loss':>9}"]
    lines += [_line(name, metrics) for name, metrics in shown if metrics is not None]
    cost = report.cost
    lines += [
        "",
        f"Removed {report.removed.components} of {report.model.components:,} components in "
        f"{report.removed.modules} of {report.model.target_modules} modules; {report.drift}. {report.outlook.message}",
        f"Adaptation {cost.adaptation_fb:.1f} FB of {cost.fb_seconds:.1f} s; peak memory "
        f"{cost.peak_memory_bytes / 2**30:.1f} GiB; adapter {cost.adapter_bytes / 1e6:.1f} MB. Written to {out}",
    ]
    return "\n".join(lines)


def _line(name: str, metrics: Metrics) -> str:
    accuracy = "-" if metrics.accuracy is None else f"{metrics.accuracy:.3f}"
    return f"{name:16}{accuracy:>10}{metrics.exact_match:>13.3f}{metrics.loss:>9.3f}"

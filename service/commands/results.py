"""What a job brought: its report on the screen, its files on the disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from service.answers import FileOut
from service.commands.options import DEFAULT_URL, AsJson, JobArgument, Url, complete_job, connect, console, errors
from service.errors import InvalidInput
from service.goals import Goal
from service.reports import Report
from service.terminal import draw

ADAPTER = ("adapter/", "report.json", "report.html", "README.md")
COMPRESSED = ("model/", "report.json", "report.html")
JOB_ID = re.compile(r"job_[0-9a-z]{20}")


def report(
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="A job's ID, or a report.json on disk, or its folder.", autocompletion=complete_job
        ),
    ],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show what a job gained, on its test split or cross-validated, and where it removed what.

    Example: c2i report JOB
    """
    found = _from_disk(Path(job))
    if found is None:
        with connect(url) as client:
            found = client.report(job)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        draw(found, console)


def _from_disk(path: Path) -> Report | None:
    """The report at a path; None where the path is a job's ID and nothing else.

    Raises:
        InvalidInput: there is none.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() and not JOB_ID.fullmatch(str(path)):
            raise InvalidInput(f"{path} holds no report.json")
        if path.suffix or len(path.parts) > 1:
            raise InvalidInput(f"{path}: no such file; a job's ID, a report.json or its folder is wanted")
        return None
    try:
        return Report.model_validate_json(file.read_bytes(), extra="ignore")
    except ValidationError:
        raise InvalidInput(f"{file} is no report of this version of c2i") from None


def download(
    job: JobArgument,
    out: Annotated[Path | None, typer.Option(help="Folder; the job's ID by default.")] = None,
    model: Annotated[bool, typer.Option("--model", help="The whole checkpoint too, not the adapter alone.")] = False,
    point: Annotated[int | None, typer.Option(help="Of compress: the model of this round, and no other.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Download the adapter and the report; of a compressed model, which has no adapter, the checkpoint. What is there
    already is not fetched again, what was cut off goes on.

    Example: c2i download JOB --model --out adapted
    """
    folder = out or Path(job)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar,
        connect(url) as client,
    ):
        tasks = {"": bar.add_task("asking", total=None)}

        def on_bytes(file: FileOut, held: int) -> None:
            if file.path not in tasks:
                bar.remove_task(tasks.popitem()[1])
                tasks[file.path] = bar.add_task(file.path, total=file.bytes)
            bar.update(tasks[file.path], completed=held)

        compressed = client.get(job).goal is Goal.COMPRESS
        only = ("",) if model else COMPRESSED if compressed else ADAPTER
        fetched = client.download(job, folder, only=only, point=point, on_bytes=on_bytes)
    if as_json:
        print(json.dumps({"folder": str(folder), "files": [str(path) for path in fetched]}))
    else:
        for path in fetched:
            print(path)

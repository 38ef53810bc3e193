"""Commands on jobs that are there: watch, jobs, cancel, delete."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from service.commands.following import end, follow
from service.commands.options import DEFAULT_URL, AsJson, JobArgument, Url, connect, console
from service.goals import Goal
from service.jobs import Job

# A worker has ten seconds to stop its job.
STOP_SECONDS = 30


def watch(job: JobArgument, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show a job's progress until it ends.

    Example: c2i watch JOB
    """
    with connect(url) as client:
        end(follow(client, job), as_json=as_json)


def jobs(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List your jobs, newest first.

    Example: c2i jobs --limit 100
    """
    with connect(url) as client:
        found = list(client.jobs(limit=limit))
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found]))
        return
    if not found:
        print("No jobs yet. `c2i submit FILE --model ID` makes one.")
        return
    columns = Column("job", no_wrap=True), "state", "created", Column("model", overflow="fold")
    table = Table(*columns, box=None, pad_edge=False)
    for job in found:
        table.add_row(job.id, state(job), f"{job.created_at.astimezone():%m-%d %H:%M}", Text(job.model))
    console.print(table)


def state(job: Job) -> str:
    """A job's status, with what is most worth knowing of it."""
    if job.result:
        if job.goal is Goal.COMPRESS:
            return "compressed"
        return "improved" if job.result.improved else "no gain"
    if job.error:
        return f"failed: {job.error.code}"
    if job.progress.queue_position:
        return f"{job.status.value}, place {job.progress.queue_position}"
    return job.status.value if job.status.terminal else f"{job.status.value}, {job.progress.percent:.0f} %"


def cancel(job: JobArgument, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Stop a job and wait until its process is gone.

    Example: c2i cancel JOB
    """
    with connect(url) as client:
        client.cancel(job)
        ended = client.wait(job, timeout=STOP_SECONDS)
    print(ended.model_dump_json() if as_json else f"{ended.id} is {ended.status.value}")


def delete(job: JobArgument, url: Url = DEFAULT_URL) -> None:
    """Forget a job that has ended, with its examples and files.

    Example: c2i delete JOB
    """
    with connect(url) as client:
        client.delete(job)
    print(f"{job} is deleted")

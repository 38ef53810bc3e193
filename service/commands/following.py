"""A job on the screen until it ends, and how it ended."""

from __future__ import annotations

import typer

from service.client import Client
from service.commands.failures import EXIT_FAILED, EXIT_INTERRUPTED
from service.commands.options import errors
from service.goals import Goal
from service.jobs import Job, JobEvent, JobStatus
from service.terminal import progress_bar


def follow(client: Client, job_id: str) -> Job:
    """Show a job's progress on stderr: a bar on a terminal, else a line an event; the job at its end.

    On Ctrl-C it says that the job goes on.
    """
    try:
        with progress_bar(errors) as bar:
            if (job := client.get(job_id)).progress.queue_position:
                bar.show(0.0, f"queued, place {job.progress.queue_position}")
            for event in client.events(job_id):
                bar.show(event.progress.percent, _describe(event), event.progress.eta_seconds)
        return client.get(job_id)
    except KeyboardInterrupt:
        tell(f"{job_id} goes on without you.", f"`c2i watch {job_id}` shows it again, `c2i cancel {job_id}` stops it")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _describe(event: JobEvent) -> str:
    stage = event.progress.stage
    return f"{stage.value}: {event.message}" if event.kind == "progress" and stage else event.message


def end(job: Job, *, as_json: bool) -> None:
    """Print how a job ended.

    Raises:
        typer.Exit: it did not succeed.
    """
    if as_json:
        print(job.model_dump_json())
    elif job.result:
        print(f"{job.id} {job.status.value}: {job.result.verdict}")
        what = "model" if job.goal is Goal.COMPRESS else "adapter"
        suggest(f"`c2i report {job.id}` for the figures, `c2i download {job.id}` for the {what}")
    elif job.error:
        where = f" ({job.error.param})" if job.error.param else ""
        again = "submit it again" if job.error.retryable else "mend that, then submit it again"
        tell(f"{job.id} failed: {job.error.message}{where}", again)
    else:
        print(f"{job.id} is {job.status.value}")
    if job.status is not JobStatus.SUCCEEDED:
        raise typer.Exit(EXIT_FAILED)


def tell(what: str, next_step: str) -> None:
    """Two lines on stderr."""
    errors.print(what, markup=False, highlight=False, soft_wrap=True)
    errors.print(f"try:   {next_step}", markup=False, highlight=False, soft_wrap=True)


def suggest(next_step: str) -> None:
    """What to do now, for people; scripts know."""
    if errors.is_terminal:
        errors.print(f"next:  {next_step}", markup=False, highlight=False, soft_wrap=True)

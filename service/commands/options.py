"""What several commands take: the service's URL, a job's ID with completion from the service, `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import httpx
import typer
from rich.console import Console

from service.client import Client
from service.errors import C2IError

DEFAULT_URL = "http://127.0.0.1:8000"
# A shell waits for it while somebody types.
COMPLETION_SECONDS = 2.0
COMPLETED_JOBS = 50

console = Console()
errors = Console(stderr=True)


def connect(url: str) -> Client:
    """A client for people: a service that is not there is told at once."""
    return Client(url, expect_running=True)


def complete_job(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """IDs of jobs for the shell, newest first, with what the shell may show beside them."""
    found = []
    with _answering(context) as client:
        found = [(job.id, f"{job.status.value}, {job.model}") for job in client.jobs(limit=COMPLETED_JOBS)]
    return [one for one in found if one[0].startswith(incomplete)]


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """IDs of installed models for the shell."""
    found = []
    with _answering(context) as client:
        found = [model.id for model in client.models() if model.error is None]
    return [one for one in found if one.startswith(incomplete)]


@contextmanager
def _answering(context: typer.Context) -> Iterator[Client]:
    """A service that answers at once; without one there is nothing to complete, and no error in the shell's line."""
    with suppress(C2IError, OSError), Client(context.params.get("url"), patience=0, expect_running=True) as client:
        client.http.timeout = httpx.Timeout(COMPLETION_SECONDS)
        yield client


Url = Annotated[str, typer.Option("--url", envvar="C2I_URL", help="The service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's ID.", autocompletion=complete_job)]
ModelOption = Annotated[str, typer.Option(help="ID of an installed model.", autocompletion=complete_model)]

"""`c2i`: the commands of the service, and those of other packages by entry points. What they do is in
`service.commands`; the exit codes are in `service.commands.failures`."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, NoReturn

import typer

from service.commands.failures import fail
from service.commands.jobs import cancel, delete, jobs, watch
from service.commands.models import models_app
from service.commands.results import download, report
from service.commands.serving import serve
from service.commands.submitting import submit
from service.errors import C2IError, Unavailable
from service.keys_cli import keys_app
from service.webhooks.cli import webhooks_app

# The panels of `c2i --help`, in this order.
JOBS = "Jobs: ask a service that runs"
LOCAL = "Without a service"
OPERATE = "Operate a service"
# Other packages' commands that are of OPERATE; their others are of LOCAL.
OPERATING = ("worker",)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"c2i {version('compress-to-impress')}")
        raise typer.Exit


def _c2i(
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """What stands before a command."""


app = typer.Typer(
    callback=_c2i,
    help="Adapt a language model to a task by removing a few hundred singular components.\n\n"
    "Example: c2i submit task.jsonl --model smollm2-135m-instruct --wait",
    epilog="Exit codes: 0 done, 1 the job failed, 2 what was asked for is wrong, 3 the service does not answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (submit, jobs, watch, report, download, cancel, delete):
    app.command(rich_help_panel=JOBS)(command)
app.add_typer(models_app, name="models", invoke_without_command=True, rich_help_panel=JOBS)


def _join_commands(panel: str) -> None:
    """Add the commands that other packages declare; a dot in a name makes a sub-command."""
    for entry in sorted(entry_points(group="c2i.commands"), key=lambda entry: entry.name):
        if panel != (OPERATE if entry.name in OPERATING else LOCAL):
            continue
        group, _, name = entry.name.rpartition(".")
        try:
            command = entry.load()
        except (ImportError, AttributeError) as error:
            command = _missing(entry, error)
        if group:
            models_app.command(name)(command)
        else:
            app.command(name, rich_help_panel=panel)(command)


def _missing(entry: EntryPoint, error: Exception) -> object:
    def command() -> NoReturn:
        raise Unavailable(f"`c2i {entry.name.replace('.', ' ')}` cannot be loaded: {error}")

    command.__doc__ = "Not available in this installation."
    return command


@cache
def assemble() -> typer.Typer:
    """All commands, those of other packages too."""
    _join_commands(LOCAL)
    app.command(rich_help_panel=OPERATE)(serve)
    _join_commands(OPERATE)
    app.add_typer(keys_app, name="keys", rich_help_panel=OPERATE)
    app.add_typer(webhooks_app, name="webhooks", rich_help_panel=OPERATE)
    return app


def main() -> None:
    """The entry point: an error is two lines, never a traceback, and the exit code says of what kind."""
    try:
        assemble()(prog_name="c2i")  # also as `python -m service.cli`
    except (C2IError, OSError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

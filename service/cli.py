"""`c2i`: serve, submit, watch, report, download, cancel, models, keys; the workers' commands join by entry points.

Exit codes: 0 done; 1 the job failed or was cancelled, or an internal error; 2 what was asked for is wrong;
3 the service, Redis or the disk does not answer.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from service import jsonl, logs
from service.client import Client
from service.commands.failures import EXIT_FAILED, fail
from service.errors import C2IError, InvalidInput, Unavailable
from service.jobs import Difference, Job, JobEvent, JobStatus, Objective, PromptFormat
from service.keys_cli import keys_app
from service.reports import Metrics, Report
from service.settings import Settings
from service.strategies import Strategy, read_options
from service.webhooks.cli import webhooks_app

# A worker has ten seconds to stop its job.
STOP_SECONDS = 30

Url = Annotated[str, typer.Option("--url", envvar="C2I_URL", help="The service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's ID.")]
DEFAULT_URL = "http://127.0.0.1:8000"

app = typer.Typer(
    help="Adapt a language model to a task by removing a few hundred singular components.",
    epilog="Exit codes: 0 done, 1 the job failed, 2 what was asked for is wrong, 3 the service is not reachable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The installed models; with no command, a list of them.", pretty_exceptions_enable=False)
app.add_typer(models_app, name="models", invoke_without_command=True)
app.add_typer(keys_app, name="keys")
app.add_typer(webhooks_app, name="webhooks")
console = Console()
errors = Console(stderr=True)


@app.command()
def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of models, artifacts and the embedded Redis.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0 serves the API alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON with the URL when ready.")] = False,
) -> None:
    """Serve the API with its workers, and an embedded Redis unless REDIS_URL is set."""
    from service.server import serve as run  # noqa: PLC0415 - the other commands need no server

    settings = Settings.load(host=host, port=port, data=data, workers=workers)
    logs.configure(settings.log_level)

    def announce(url: str) -> None:
        ready = {"url": url, "data": str(settings.data)}
        print(json.dumps(ready) if as_json else f"Serving on {url}, data in {settings.data}", flush=True)

    run(settings, announce)


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help='Lines of {"prompt", "completion", "choices"?}.')],
    *,
    model: Annotated[str, typer.Option(help="ID of an installed model.")],
    passes: Annotated[int, typer.Option(help="Rounds of backward, ranking and search, 1 to 8.")] = 1,
    strategy: Annotated[Strategy, typer.Option(help="Which structures may be removed.")] = Strategy.COMPONENTS,
    strategy_options: Annotated[str | None, typer.Option(help="Its options as JSON: '{\"matrices\": 3}'.")] = None,
    objective: Annotated[Objective, typer.Option(help="The loss.")] = Objective.BOTH,
    prompt_format: Annotated[PromptFormat, typer.Option(help="Raw text or a chat's turn.")] = PromptFormat.TEXT,
    validation: Annotated[Path | None, typer.Option(help="JSONL of your own selection split.")] = None,
    test: Annotated[Path | None, typer.Option(help="JSONL of your own test split.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    max_drift: Annotated[
        float | None, typer.Option(help="Most change of the model's predictions on neutral text, in nats a token.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job to its end.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Submit a job; prints its ID."""
    if max_drift is not None and not math.isfinite(max_drift):  # JSON has no word for it
        raise InvalidInput("not a finite number", param="max_drift")
    paths = {"examples": file, "validation": validation, "test": test}
    files = {name: jsonl.read(path) for name, path in paths.items() if path is not None}
    spec = {
        "model": model,
        "passes": passes,
        "strategy": strategy.value,
        "strategy_options": read_options(strategy_options),
        "objective": objective.value,
        "prompt_format": prompt_format.value,
        "seed": seed,
        "max_drift": max_drift,
        **{name: lines.objects for name, lines in files.items()},
    }
    with Client(url, expect_running=True) as client:
        try:
            job = client.submit(spec)
        except InvalidInput as error:
            raise jsonl.locate(error, files) from None
        if wait:
            if not as_json:
                print(f"{job.id} is queued", file=sys.stderr)
            _end(_follow(client, job.id), as_json)
        else:
            print(job.model_dump_json() if as_json else job.id)


@app.command()
def watch(job: JobArgument, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show a job's progress until it ends."""
    with Client(url, expect_running=True) as client:
        _end(_follow(client, job), as_json)


@app.command()
def cancel(job: JobArgument, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Stop a job and wait until its process is gone."""
    with Client(url, expect_running=True) as client:
        client.cancel(job)
        ended = client.wait(job, timeout=STOP_SECONDS)
    print(ended.model_dump_json() if as_json else f"{ended.id} is {ended.status.value}")


@app.command()
def download(
    job: JobArgument,
    out: Annotated[Path | None, typer.Option(help="Folder; the job's ID by default.")] = None,
    model: Annotated[bool, typer.Option("--model", help="The whole checkpoint too, not the adapter alone.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Download the adapter and the report. What is there already is not fetched again."""
    folder = out or Path(job)
    prefixes = ("",) if model else ("adapter/", "report.json", "README.md")
    fetched = []
    with Client(url, expect_running=True) as client:
        for path in client.download(job, folder, only=prefixes):
            fetched.append(str(path))
            if not as_json:
                print(path)
    if as_json:
        print(json.dumps({"folder": str(folder), "files": fetched}))


@app.command()
def report(job: JobArgument, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show what a job gained on examples that it had not seen."""
    with Client(url, expect_running=True) as client:
        found = client.report(job)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        _print_report(found)


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List the installed models."""
    if context.invoked_subcommand:
        return
    with Client(url, expect_running=True) as client:
        found = client.models()
    if as_json:
        print(json.dumps([model.model_dump() for model in found]))
        return
    if not found:
        print("No models are installed. `c2i models add smollm2-135m-instruct` adds a small one.")
        return
    table = Table("model", "architecture", "parameters", "type", "context", "chat", box=None)
    for model in found:
        if model.error:
            table.add_row(model.id, f"[red]{model.error.message}[/red]")
        else:
            columns = (model.architecture, f"{model.parameters:,}", model.dtype, str(model.context_length))
            table.add_row(model.id, *columns, "yes" if model.chat else "no")
    console.print(table)


def _follow(client: Client, job_id: str) -> Job:
    """Show events until the job has ended: a bar on a terminal, else a line an event."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task("queued", total=100)
        for event in client.events(job_id):
            if errors.is_terminal:
                bar.update(task, description=_describe(event), completed=event.progress.percent)
            else:
                print(f"{event.progress.percent:5.1f} %  {_describe(event)}", file=sys.stderr)
    return client.get(job_id)


def _describe(event: JobEvent) -> str:
    stage = event.progress.stage
    return f"{stage.value}: {event.message}" if event.kind == "progress" and stage else event.message


def _end(job: Job, as_json: bool) -> None:
    if as_json:
        print(job.model_dump_json())
    elif job.result:
        print(f"{job.id} {job.status.value}: {job.result.verdict}")
    elif job.error:
        where = f" ({job.error.param})" if job.error.param else ""
        print(f"{job.id} failed: {job.error.message}{where}", file=sys.stderr)
    else:
        print(f"{job.id} is {job.status.value}")
    if job.status is not JobStatus.SUCCEEDED:
        raise typer.Exit(EXIT_FAILED)


def _print_report(found: Report) -> None:
    table = Table("", "base", "after one pass", "adapted", "difference", "95 % interval", "p", box=None)
    columns = [found.base, found.after_first_pass, found.adapted]
    for name in ("exact_match", "accuracy", "loss"):
        difference = next((one for one in found.differences if one.metric == name), None)
        table.add_row(name, *(_figure(column, name) for column in columns), *_interval(difference))
    console.print(table)
    print(found.verdict)
    print(f"Returned with {found.drift}.")


def _figure(metrics: Metrics | None, name: str) -> str:
    value = getattr(metrics, name) if metrics else None
    return "" if value is None else f"{value:.3f}"


def _interval(difference: Difference | None) -> tuple[str, ...]:
    if difference is None:
        return ("", "", "")
    return (f"{difference.value:+.3f}", f"{difference.low:+.3f} to {difference.high:+.3f}", f"{difference.p:.2g}")


def _join_commands() -> None:
    """Add the commands that other packages declare; a dot in a name makes a sub-command."""
    for entry in sorted(entry_points(group="c2i.commands"), key=lambda entry: entry.name):
        group, _, name = entry.name.rpartition(".")
        target = models_app if group == "models" else app
        try:
            command = entry.load()
        except (ImportError, AttributeError) as error:
            command = _missing(entry, error)
        target.command(name)(command)


def _missing(entry: EntryPoint, error: Exception) -> object:
    def command() -> NoReturn:
        raise Unavailable(f"`c2i {entry.name.replace('.', ' ')}` cannot be loaded: {error}")

    command.__doc__ = "Not available in this installation."
    return command


def main() -> None:
    """The entry point: errors are a line, never a traceback, and the exit code says of what kind."""
    _join_commands()
    try:
        app()
    except (C2IError, OSError) as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()

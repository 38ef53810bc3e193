"""`c2i submit`: a job from a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from service import example_files, jsonl
from service.answers import Estimate
from service.client import Client
from service.commands.following import end, follow, suggest
from service.commands.options import DEFAULT_URL, AsJson, ModelOption, Url, connect, console
from service.errors import InvalidInput
from service.goals import Goal
from service.jobs import Gguf, Objective, PromptFormat, Quantize
from service.strategies import Strategy, read_options
from service.terminal import clock


def submit(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", allow_dash=True, help="JSON lines or CSV, an example a line; - for stdin."),
    ],
    *,
    model: ModelOption,
    goal: Annotated[Goal, typer.Option(help="A better model, or a smaller one.")] = Goal.IMPROVE,
    target: Annotated[
        str | None, typer.Option(help="Of compress: parameters=0.8, or bytes, or decode_latency, of the base's.")
    ] = None,
    passes: Annotated[int, typer.Option(help="Rounds of backward, ranking and search, 1 to 8.")] = 1,
    strategy: Annotated[Strategy, typer.Option(help="Which structures may be removed.")] = Strategy.COMPONENTS,
    strategy_options: Annotated[str | None, typer.Option(help="Its options as JSON: '{\"matrices\": 3}'.")] = None,
    objective: Annotated[Objective, typer.Option(help="The loss.")] = Objective.BOTH,
    prompt_format: Annotated[PromptFormat, typer.Option(help="Raw text or a chat's turn.")] = PromptFormat.TEXT,
    validation: Annotated[Path | None, typer.Option(help="File of your own selection split.")] = None,
    test: Annotated[Path | None, typer.Option(help="File of your own test split.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    max_drift: Annotated[
        float | None, typer.Option(help="Most change of the model's predictions on neutral text, in nats a token.")
    ] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Also store the result in fewer bits.")] = None,
    gguf: Annotated[Gguf | None, typer.Option(help="Also write the result as one file for llama.cpp.")] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="An https URL to be told of the end.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and tell what it would take; no job.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job to its end.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Submit a job; prints its ID.

    An example has "prompt", "completion" and, if you like, "choices"; in a chat also "turns" before the prompt. A CSV
    has columns of the first three names, and choices in one cell with | between them.

    Example: c2i submit task.jsonl --model smollm2-135m-instruct --passes 4 --wait
    """
    if max_drift is not None and not math.isfinite(max_drift):  # JSON has no word for it
        raise InvalidInput("not a finite number", param="max_drift")
    paths = {"examples": file, "validation": validation, "test": test}
    files = {name: example_files.read(path) for name, path in paths.items() if path is not None}
    spec: dict[str, object] = {
        "model": model,
        "goal": goal.value,
        "target": target,
        "passes": passes,
        "strategy": strategy.value,
        "strategy_options": read_options(strategy_options),
        "objective": objective.value,
        "prompt_format": prompt_format.value,
        "seed": seed,
        "max_drift": max_drift,
        "quantize": quantize.value if quantize else None,
        "gguf": gguf.value if gguf else None,
        "webhook": {"url": webhook} if webhook else None,
        **{name: lines.objects for name, lines in files.items()},
    }
    with connect(url) as client:
        try:
            _submit(client, spec, dry_run=dry_run, wait=wait, as_json=as_json)
        except InvalidInput as error:
            raise jsonl.locate(error, files) from None


def _submit(client: Client, spec: dict[str, object], *, dry_run: bool, wait: bool, as_json: bool) -> None:
    if dry_run:
        estimate = client.estimate(spec)
        if as_json:
            print(estimate.model_dump_json())
        else:
            console.print(describe(estimate), markup=False, highlight=False)
        return
    job = client.submit(spec)
    if not wait:
        print(job.model_dump_json() if as_json else job.id)
        suggest(f"`c2i watch {job.id}`")
        return
    if not as_json:
        typer.echo(f"{job.id} is {job.status.value}", err=True)
    end(follow(client, job.id), as_json=as_json)


def describe(estimate: Estimate) -> str:
    """An estimate in a few lines."""
    stages = ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in estimate.stages.items())
    speed = "by a worker's own speed" if estimate.measured_speed else "on a usual core; no worker has told its speed"
    return (
        f"The job can be submitted. It would take about {clock(estimate.seconds)} ({speed}): {stages}.\n"
        f"Memory {estimate.memory_bytes / 1e9:.1f} GB; disk {estimate.disk_bytes / 1e9:.2f} GB; "
        f"{estimate.tokens:,} tokens."
    )

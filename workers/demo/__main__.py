"""The whole way of a job, as its user goes it: serve, submit over HTTP, watch, read the report, download, use.

    python -m workers.demo [--data DIR] [--passes N] [--seed N]

Leaves nothing running, also on Ctrl-C and on failure, and exits with 0 only if the adapted model is better, by its own
report, and answers differently when a process that knows nothing of this project loads it with PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from service.client import Client
from service.errors import C2IError, InternalError, Unavailable
from service.jobs import Difference, JobSpec
from service.processes import die_with_parent
from service.reports import Metrics, Report
from service.settings import Settings
from workers.catalogue import SMOLLM2
from workers.demo.task import Task, build_task

START_SECONDS = 60.0
# Its worker has ten to stop its job, then Redis stops.
STOP_SECONDS = 20.0
# Ten times what it takes on two cores: only where no worker can run does it take longer.
LONGEST_STEP_SECONDS = 1_800.0
# Of the test's first prompts so many are completed before and after; three that came right are shown.
COMPLETED = 60
SHOWN = 3

# Paths and URLs stay whole, to be copied.
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m workers.demo", description="A job's whole way, over HTTP.")
    parser.add_argument("--data", type=Path, help="data folder, ./data by default")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        run(Settings.load(data=arguments.data).data, arguments.passes, arguments.seed)
    except KeyboardInterrupt:
        sys.exit("interrupted; everything that was started is stopped")
    except C2IError as error:
        sys.exit(f"error: {error.message}")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(data: Path, passes: int, seed: int) -> None:
    """The demo, from the model's download to the last completion.

    Raises:
        C2IError: any step failed, or the model did not get better.
    """
    began = time.monotonic()
    say("1. The model")
    _run_cli("models", "add", SMOLLM2, "--data", str(data))
    model_folder = data / "models" / SMOLLM2

    say("2. The task: which country is this city in?")
    task = build_task(seed=seed)
    console.print(f"{len(task.examples)} examples to learn from, {len(task.test)} others to be judged on. The first:")
    console.print(f"{task.examples[0].prompt}[bold]{task.examples[0].completion}[/bold]", style="dim")

    say("3. The service and the job")
    with serving(data) as url, Client(url) as client:
        console.print(f"`c2i serve` answers on {url}")
        spec = JobSpec(model=SMOLLM2, examples=task.examples, test=task.test, passes=passes, seed=seed)
        job = client.submit(spec)
        console.print(f"POST {url}/v1/jobs: {job.id} is {job.status.value}")
        try:
            _run_cli("watch", job.id, "--url", url)
        except BaseException:
            # Else it would still be in the queue, before the next demo's.
            _cancel(client, job.id)
            raise
        report = client.report(job.id)

        say("4. What it gained, on the examples that it had not seen")
        console.print(results(report), soft_wrap=False)
        console.print(report.verdict)

        say("5. The adapter")
        folder = data / "demo" / job.id
        for path in client.download(job.id, folder, only=("adapter/", "report.json")):
            console.print(f"{path} ({path.stat().st_size:,} bytes)")

    say("6. The adapter in a fresh process, with transformers and PEFT alone")
    show_completions(model_folder, folder / "adapter", task)
    if not report.improved:
        raise InternalError("the adapted model is not better than the base model")
    console.print(f"\nDone in {time.monotonic() - began:.0f} s; nothing is left running.")


def say(title: str) -> None:
    """Begin a step."""
    console.print(f"\n[bold]{title}[/bold]")


@contextmanager
def serving(data: Path) -> Iterator[str]:
    """`c2i serve` on a free loopback port: its URL. It is gone afterwards, however this process ends."""
    command = [sys.executable, "-m", "service.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    command += ["--data", str(data), "--json"]
    # The demo has a Redis of its own.
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    log = data / "demo" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stderr:
        server = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Ctrl-C is for this process, which then stops the server in order.
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - this process has one thread
        )
    try:
        yield _wait_for_url(server, log)
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for_url(server: subprocess.Popen[bytes], log: Path) -> str:
    line = b""
    if server.stdout and any(select.select([server.stdout], [], [], START_SECONDS)):
        line = server.stdout.readline()
    if not line:
        reason = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise Unavailable(f"`c2i serve` did not start: {reason[0]}; more in {log}")
    return str(json.loads(line)["url"])


def _run_cli(*arguments: str) -> None:
    """Run a `c2i` command on this terminal."""
    console.print(f"$ c2i {' '.join(arguments)}", style="dim")
    command = [sys.executable, "-m", "service.cli", *arguments]
    try:
        result = subprocess.run(command, timeout=LONGEST_STEP_SECONDS, check=False)  # noqa: S603 - our own command
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`c2i {arguments[0]}` did not end in {LONGEST_STEP_SECONDS:.0f} s") from None
    if result.returncode != 0:
        raise InternalError(f"`c2i {arguments[0]}` ended with {result.returncode}; the reason stands above")


def _cancel(client: Client, job_id: str) -> None:
    # A job that has ended, or a service that died, is no second error.
    with suppress(C2IError):
        client.cancel(job_id)


def results(report: Report) -> Table:
    """Base, after one pass, after all: exact match and loss with the interval of their difference to the base."""
    accepted = sum(one.accepted for one in report.passes)
    columns: list[tuple[str, Metrics | None, list[Difference]]] = [
        ("base", report.base, []),
        ("after one pass", report.after_first_pass, report.first_pass_differences),
        (f"after all {accepted}", report.adapted, report.differences),
    ]
    table = Table("", *(name for name, _, _ in columns), box=None, pad_edge=False)
    for metric, label in (("exact_match", "exact match"), ("loss", "loss")):
        table.add_row(label, *(f"{getattr(metrics, metric):.3f}" if metrics else "" for _, metrics, _ in columns))
        table.add_row("  difference, 95 %", *(interval(differences, metric) for _, _, differences in columns))
    return table


def interval(differences: list[Difference], metric: str) -> str:
    """`+0.167 [+0.110, +0.223]`, empty where the metric was not compared."""
    for one in differences:
        if one.metric == metric:
            return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
    return ""


def show_completions(model_folder: Path, adapter_folder: Path, task: Task) -> None:
    """Complete the test's first prompts in a fresh process; count what is right, print three that came right.

    Raises:
        InternalError: the process fails, or the adapter changes nothing.
    """
    examples = task.test[:COMPLETED]
    result = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "workers.demo.use", str(model_folder), str(adapter_folder)],
        input=json.dumps([example.prompt for example in examples]),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InternalError(f"the adapter could not be used in a fresh process: {lines[0]}")
    completions = json.loads(result.stdout)
    rows = [(example, before, after) for example, (_, before, after) in zip(examples, completions, strict=True)]
    if all(before == after for _, before, after in rows):
        raise InternalError("with the adapter the model completes every prompt as without it")
    right_before = [before.startswith(example.completion) for example, before, _ in rows]
    right_after = [after.startswith(example.completion) for example, _, after in rows]
    came_right = [row for row, was, now in zip(rows, right_before, right_after, strict=True) if now and not was]
    went_wrong = sum(was and not now for was, now in zip(right_before, right_after, strict=True))
    console.print(
        f"Of the test's first {len(rows)} prompts {sum(right_before)} were right before and {sum(right_after)} are "
        f"after: {len(came_right)} came right, {went_wrong} went wrong. The first that came right:"
    )
    for example, before, after in came_right[:SHOWN]:
        console.print(f"\n{example.prompt}", style="dim", markup=False)
        console.print(f"  before: {before!r}", markup=False)
        console.print(f"  after:  {after!r}", markup=False)


if __name__ == "__main__":
    main()

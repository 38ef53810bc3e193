"""`c2i bench`: what its options mean, checked before anything is measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import typer

from service import models
from service.errors import InvalidInput, Unavailable
from service.jobs import MIN_EXAMPLES
from service.settings import Settings
from workers.benchmark.methods import parse_methods
from workers.benchmark.runs import run
from workers.benchmark.tasks import Sizes, find_tasks


def run_bench(
    data: Path, model: str, out: Path, tasks: str | None, methods: str, seeds: int, rows: str, settings: Settings
) -> None:
    """Run the benchmark, telling on stderr how far it is.

    Args:
        data: the folder of task files.
        tasks: their names, with commas between; all if None.
        rows: `100,100,300`: rows of the gradient, selection and test split.
        settings: for the models and the cache.

    Raises:
        InvalidInput: naming the option that is wrong.
        Unavailable: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise Unavailable("the plots need matplotlib: pip install 'compress-to-impress[bench]'")
    names = None if tasks is None else _listed(tasks)
    if names == []:
        raise InvalidInput("no task is named", param="tasks")
    if seeds < 1:
        raise InvalidInput("at least one seed is needed", param="seeds")
    sizes = _sizes(rows)
    chosen = parse_methods(methods)
    found = find_tasks(data, names)
    resolved = models.resolve(settings.models, model)
    run(found, chosen, seeds, sizes, resolved, settings.cache, out, lambda line: typer.echo(line, err=True))


def _sizes(text: str) -> Sizes:
    try:
        gradient, selection, test = map(int, _listed(text))
    except ValueError:
        raise InvalidInput("three numbers of rows with commas between, 100,100,300 say", param="rows") from None
    if min(gradient, selection, test) < MIN_EXAMPLES:
        raise InvalidInput(f"at least {MIN_EXAMPLES} rows for each split", param="rows")
    return Sizes(gradient, selection, test)


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]

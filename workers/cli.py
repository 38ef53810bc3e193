"""The commands that need the workers' packages. Torch is imported inside them: `c2i --help` does not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service import logs
from service.errors import Unavailable
from service.settings import Settings
from service.strategies import read_options
from workers.offline import go_offline


def worker(
    data: Annotated[Path | None, typer.Option(help="Data folder, the same as the service's.")] = None,
    tries: Annotated[bool, typer.Option("--tries", help="Answer tries, and take no jobs.")] = False,
) -> None:
    """Take jobs from the queue at REDIS_URL until stopped. `c2i serve` starts workers itself.

    Example: c2i worker --data ./data
    """
    settings = Settings.load(data=data)
    logs.configure(settings.log_level)
    if settings.redis_url is None:
        raise Unavailable(
            "set REDIS_URL to the Redis that the service uses; `c2i serve` with its embedded Redis starts its own"
        )
    go_offline()
    try:
        from workers.adaptation import adapt  # noqa: PLC0415 - imports torch
        from workers.answering import Answers  # noqa: PLC0415
        from workers.worker import take, work  # noqa: PLC0415
    except (ImportError, OSError) as error:
        raise Unavailable(f"the worker's packages cannot be loaded: {error}") from error

    if tries:
        url = settings.redis_url
        take(lambda: Answers(settings, url), settings)
    else:
        work(settings, settings.redis_url, adapt)


def models_add(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="smollm2-135m-instruct, or owner/name of the Hugging Face Hub.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; main, if not given.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder, the same as the service's.")] = None,
) -> None:
    """Put a model into the data folder; one that is there already is left alone.

    Example: c2i models add smollm2-135m-instruct
    """
    from workers.catalogue import add_model  # noqa: PLC0415 - imports the Hub's client

    add_model(model, Settings.load(data=data).data, revision=revision)


def adapt(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", allow_dash=True, help="JSON lines or CSV, an example a line; - for stdin.")
    ],
    model: Annotated[str, typer.Option(help="ID of an installed model; `c2i models add ID` installs one.")],
    out: Annotated[Path, typer.Option(help="A new folder for adapter/, model/ and report.json.")],
    goal: Annotated[str, typer.Option(help="improve, or compress for a smaller model.")] = "improve",
    target: Annotated[
        str | None, typer.Option(help="Of compress: parameters=0.8, or bytes, or decode_latency, of the base's.")
    ] = None,
    passes: Annotated[int, typer.Option(help="Rounds of backward, ranking and search, 1 to 8.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="components, heads, neurons, layers, blocks, mixed, laser or c2i.")
    ] = "components",
    strategy_options: Annotated[str | None, typer.Option(help="Its options as JSON: '{\"matrices\": 3}'.")] = None,
    objective: Annotated[str, typer.Option(help="both, choice or completion.")] = "both",
    prompt_format: Annotated[str, typer.Option(help="text, or chat for the tokenizer's template.")] = "text",
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    max_drift: Annotated[
        float | None, typer.Option(help="Most change of the model's predictions on neutral text, in nats a token.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 or int4: also store the result in fewer bits.")] = None,
    gguf: Annotated[str | None, typer.Option(help="f16 or q8_0: also write one file for llama.cpp.")] = None,
    gradient: Annotated[int | None, typer.Option(help="The first N rows are the gradient split.")] = None,
    selection: Annotated[
        int, typer.Option(help="With --gradient: the next N rows select; 0: halves of its rows, cross-fitted under 60.")
    ] = 0,
    test: Annotated[int | None, typer.Option(help="With --gradient: the next N rows test; all that are left.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder, the same as the service's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Adapt a model here and now. Writes the same artifacts as a job.

    Example: c2i adapt task.jsonl --model smollm2-135m-instruct --passes 4 --out adapted
    """
    go_offline()
    with _starting():
        from workers.local import run  # noqa: PLC0415 - imports torch

    settings = Settings.load(data=data)
    fields = {
        "model": model,
        "goal": goal,
        "target": target,
        "passes": passes,
        "strategy": strategy,
        "strategy_options": read_options(strategy_options),
        "objective": objective,
        "prompt_format": prompt_format,
        "seed": seed,
        "max_drift": max_drift,
        "quantize": quantize,
        "gguf": gguf,
    }
    run(file, fields, out, settings, rows=(gradient, selection, test), as_json=as_json)


def apply(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Its folder, the folder of `c2i download`, or an adapter.zip.")
    ],
    base: Annotated[str, typer.Option(metavar="MODEL", help="The model that it was made from: an ID, or a folder.")],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    data: Annotated[Path | None, typer.Option(help="Data folder of the installed models.")] = None,
) -> None:
    """Merge an adapter into its base model, exactly: a model that needs neither c2i nor PEFT.

    Example: c2i apply adapter.zip --base smollm2-135m-instruct --out merged
    """
    go_offline()
    with _starting():
        from workers.applying import run  # noqa: PLC0415 - imports torch

    run(adapter, base, out, Settings.load(data=data))


def gguf(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint: the model/ of `c2i download`, say.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="A new file.")],
    kind: Annotated[str, typer.Option("--type", help="f16, or q8_0 for 8 bits.")] = "q8_0",
) -> None:
    """Write a checkpoint as one GGUF file, the format of llama.cpp and what is built on it.

    Example: c2i gguf adapted/model --out model.gguf
    """
    go_offline()
    with _starting():
        from workers.gguf_files import run  # noqa: PLC0415 - imports torch

    run(folder, out, kind)


def bench(
    data: Annotated[Path, typer.Option(help="Folder of task files, TASK.jsonl with one example a line.")],
    model: Annotated[str, typer.Option(help="ID of an installed model; `c2i models add ID` installs one.")],
    out: Annotated[Path, typer.Option(help="Folder for bench.json, tables and plots; a run there goes on.")],
    tasks: Annotated[str | None, typer.Option(help="Names of task files; all, if not given.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="base, majority, fewshot, laser, c2i, lora, components:1 to components:8; heads, neurons, layers, "
            "blocks, mixed; at equal size heads@0.9, heads/michel@0.9, magnitude@0.9; compress/layers@0.8."
        ),
    ] = "base,majority,fewshot,lora,c2i,laser,components:1,components:8",
    seeds: Annotated[int, typer.Option(help="How many shuffles of each task's rows.")] = 3,
    rows: Annotated[str, typer.Option(help="Rows of the gradient, selection and test split.")] = "100,100,300",
) -> None:
    """Hold the method against its peers, on the same rows. Models and cache are those of C2I_DATA.

    Example: c2i bench --data tasks --model smollm2-135m-instruct --out results
    """
    go_offline()
    from workers.benchmark.command import run_bench  # noqa: PLC0415 - imports torch

    run_bench(data, model, out, tasks, methods, seeds, rows, Settings.load())


@contextmanager
def _starting() -> Iterator[None]:
    """Torch takes seconds to load: on a terminal something moves meanwhile."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status("loading torch"):
        yield

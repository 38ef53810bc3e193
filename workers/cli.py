"""The commands that need the workers' packages. Torch is imported inside them: `c2i --help` does not wait for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from service.errors import Unavailable
from service.settings import Settings


def worker(
    data: Annotated[Path | None, typer.Option(help="Data folder, the same as the service's.")] = None,
) -> None:
    """Take jobs from the queue at REDIS_URL until stopped. `c2i serve` starts workers itself."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings.load(data=data)
    if settings.redis_url is None:
        raise Unavailable(
            "set REDIS_URL to the Redis that the service uses; `c2i serve` with its embedded Redis starts its own"
        )
    from workers.adaptation import adapt  # noqa: PLC0415 - imports torch
    from workers.worker import work  # noqa: PLC0415

    work(settings, settings.redis_url, adapt)


def models_add(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="smollm2-135m-instruct, or owner/name of the Hugging Face Hub.")
    ],
    data: Annotated[Path | None, typer.Option(help="Data folder, the same as the service's.")] = None,
) -> None:
    """Put a model into the data folder; one that is there already is left alone."""
    from workers.catalogue import add_model  # noqa: PLC0415 - imports the Hub's client

    add_model(model, Settings.load(data=data).data)

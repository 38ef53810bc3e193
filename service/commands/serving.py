"""`c2i serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from service import logs
from service.settings import Settings


def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of models, artifacts and the embedded Redis.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0 serves the API alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON with the URL when ready.")] = False,
) -> None:
    """Serve the API with its workers, and an embedded Redis unless REDIS_URL is set.

    Example: c2i serve --port 8080 --data ./data
    """
    from service.server import serve as run  # noqa: PLC0415 - the other commands need no server

    settings = Settings.load(host=host, port=port, data=data, workers=workers)
    logs.configure(settings.log_level)

    def announce(url: str) -> None:
        ready = {"url": url, "data": str(settings.data)}
        print(json.dumps(ready) if as_json else f"Serving on {url}, data in {settings.data}", flush=True)

    run(settings, announce)

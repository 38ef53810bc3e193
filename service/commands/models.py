"""`c2i models`: what is installed; the workers' `add` joins it."""

from __future__ import annotations

import json

import typer
from rich.table import Column, Table
from rich.text import Text

from service.commands.options import DEFAULT_URL, AsJson, Url, connect, console

models_app = typer.Typer(
    help="The installed models; with no command, a list of them.\n\nExample: c2i models",
    pretty_exceptions_enable=False,
)


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List the installed models.

    Example: c2i models
    """
    if context.invoked_subcommand:
        return
    with connect(url) as client:
        found = client.models()
    if as_json:
        print(json.dumps([model.model_dump() for model in found]))
        return
    if not found:
        print("No models are installed. `c2i models add smollm2-135m-instruct` adds a small one.")
        return
    table = Table(
        Column("model", no_wrap=True), "architecture", "parameters", "type", "context", "chat", box=None, pad_edge=False
    )
    refused = []
    for model in found:
        if model.error:
            refused.append(f"{model.id} cannot be used: {model.error.message}")
            continue
        columns = (model.architecture, f"{model.parameters:,}", model.dtype, str(model.context_length or ""))
        table.add_row(model.id, *columns, "yes" if model.chat else "no")
    if table.rows:
        console.print(table)
    for line in refused:
        console.print(Text(line))

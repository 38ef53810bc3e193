"""`c2i webhooks`: what receivers verify deliveries with. It works on the service's Redis, whether the service runs or
not."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from service.errors import NotFound
from service.keys_cli import AsJson, Data
from service.settings import Settings

webhooks_app = typer.Typer(
    help="Signed messages of jobs' ends, on the service's own machine.\n\nExample: c2i webhooks secret",
    no_args_is_help=True,
)


@webhooks_app.callback()
def _group() -> None:
    """Without it, typer would make `secret` the group itself."""


@webhooks_app.command()
def secret(
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="Of an API key, as `c2i keys list` shows it.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print the secret that signs the messages of a key's jobs; without --key, of jobs submitted without one.

    Example: c2i webhooks secret --key ID
    """
    from service.connections import connect  # noqa: PLC0415
    from service.embedded import reach_redis  # noqa: PLC0415 - the other commands need no Redis
    from service.keys import KeyStore  # noqa: PLC0415
    from service.webhooks.signing import SigningSecrets  # noqa: PLC0415

    with reach_redis(Settings.load(data=data)) as url, connect(url) as redis:
        if key is not None and key not in {one.id for one in KeyStore(redis).list_keys()}:
            raise NotFound("no key has this ID; `c2i keys list` shows them", param="--key")
        found = SigningSecrets(redis).of(key or "")
    print(json.dumps({"secret": found}) if as_json else found)

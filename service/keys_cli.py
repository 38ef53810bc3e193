"""`c2i keys`: create, list, revoke. They work on the service's Redis, whether the service runs or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from service.errors import InvalidInput
from service.keys import Key, KeyStore, Scope
from service.settings import Settings

Data = Annotated[Path | None, typer.Option(help="Data folder of the service, where its Redis is the embedded one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UNITS = {"d": "days", "h": "hours", "m": "minutes"}

keys_app = typer.Typer(help="API keys, on the service's own machine.\n\nExample: c2i keys list", no_args_is_help=True)


@keys_app.command()
def create(
    *,
    name: Annotated[str, typer.Option(help="Whose it is, for `c2i keys list`.")],
    scopes: Annotated[str, typer.Option(help="Of submit, read, admin; with commas.")] = "submit,read",
    expires: Annotated[str | None, typer.Option(help="After 30d, 12h or 90m; never by default.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it, this once: only its sha256 is stored.

    Example: c2i keys create --name laptop --expires 30d
    """
    wanted, lifetime = _scopes(scopes), _lifetime(expires)
    with _keys(data) as keys:
        text, key = keys.create(name, wanted, lifetime)
    if as_json:
        print(json.dumps({"key": text} | _shown(key)))
    else:
        print(text)
        Console(stderr=True).print(f"{key.id}: keep the key now, it is not shown again.")


@keys_app.command("list")
def list_keys(data: Data = None, as_json: AsJson = False) -> None:
    """List the keys: never their text, which is not stored.

    Example: c2i keys list
    """
    with _keys(data) as keys:
        found = keys.list_keys()
    if as_json:
        print(json.dumps([_shown(key) for key in found]))
        return
    table = Table(
        Column("id", no_wrap=True, min_width=20),
        "name",
        "scopes",
        "created",
        "expires",
        "state",
        box=None,
        pad_edge=False,
    )
    for key in found:
        table.add_row(
            key.id,
            key.name,
            ",".join(sorted(key.scopes)),
            f"{key.created_at:%Y-%m-%d}",
            f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "never",
            key.state,
        )
    Console().print(table)


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `c2i keys list` shows it.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """End a key with the next request that uses it. Its jobs stay, for admin keys to see.

    Example: c2i keys revoke ID
    """
    with _keys(data) as keys:
        revoked = keys.revoke(key)
    print(json.dumps(_shown(revoked)) if as_json else f"{revoked.id} is revoked")


@contextmanager
def _keys(data: Path | None) -> Iterator[KeyStore]:
    from service.connections import connect  # noqa: PLC0415
    from service.embedded import reach_redis  # noqa: PLC0415 - the other commands need no Redis

    with reach_redis(Settings.load(data=data)) as url, connect(url) as redis:
        yield KeyStore(redis)


def _shown(key: Key) -> dict[str, object]:
    return key.model_dump(mode="json") | {"scopes": sorted(scope.value for scope in key.scopes), "state": key.state}


def _scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(name.strip()) for name in text.split(","))
    except ValueError:
        raise InvalidInput("a list of submit, read and admin, with commas", param="--scopes") from None


def _lifetime(text: str | None) -> timedelta | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})([dhm])", text)
    if match is None:
        raise InvalidInput("a number of days, hours or minutes: 30d, 12h, 90m", param="--expires")
    return timedelta(**{UNITS[match[2]]: int(match[1])})

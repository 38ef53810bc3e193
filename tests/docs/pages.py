"""Which pages there are, and the text of those that are made, or have parts that are made."""

from __future__ import annotations

import tempfile
from pathlib import Path

from service.main import create_app
from service.settings import Settings
from tests.docs.reference import api_page
from tests.docs.tables import errors_table, settings_table
from tests.live import REPOSITORY

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
API = DOCS / "api.md"
OPERATING = DOCS / "operating.md"


def all_pages() -> list[Path]:
    """README and every page of docs/, but records of past runs, whose commands take hours."""
    return [README, *sorted(DOCS.glob("*.md"))]


def made_pages() -> dict[Path, str]:
    """What each page that is made, or has parts that are, should be now."""
    from tests.docs.measured import methods_table, peers_table  # and with it, torch

    tables = {"settings": settings_table(), "errors": errors_table()}
    measured = {"methods": methods_table(), "peers": peers_table()}
    return {
        API: api_page(openapi()),
        OPERATING: with_parts(OPERATING.read_text(), tables),
        README: with_parts(README.read_text(), measured),
    }


def openapi() -> dict[str, object]:
    """The document of a service that asks for keys: it names the most errors."""
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is connected to before the application starts.
        return create_app(Settings(data=Path(folder), require_keys=True), "redis://127.0.0.1:1").openapi()


def with_parts(page: str, parts: dict[str, str]) -> str:
    """The page with what stands between `<!-- NAME: ... -->` and `<!-- end -->` made anew."""
    for name, text in parts.items():
        head, start, rest = page.partition(f"<!-- {name}:")
        comment, line_end, rest = rest.partition("\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the page has no part <!-- {name}: ... --> ... <!-- end -->")
        page = f"{head}{start}{comment}{line_end}\n{text}\n\n{end}{tail}"
    return page

"""Renew docs/api.md and the tables of docs/operating.md and README.md: `python -m tests.docs`."""

from __future__ import annotations

from tests.docs.pages import made_pages

for path, text in made_pages().items():
    path.write_text(text)

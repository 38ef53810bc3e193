"""Files of examples: JSON Lines, or CSV by its name's ending; from stdin either, by its first character. Errors name
the file and the line."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from pathlib import Path

from service import jsonl
from service.errors import InvalidInput
from service.jsonl import JsonLines

STDIN = Path("-")
COLUMNS = ("prompt", "completion", "choices")
CHOICES_BETWEEN = "|"


def read(path: Path) -> JsonLines:
    """The examples of a file; `-` is stdin.

    Raises:
        InvalidInput: it cannot be read, or a line is no example.
    """
    if path == STDIN:
        content = sys.stdin.buffer.read()
        is_json = content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[", b"")
        return jsonl.parse("stdin", content) if is_json else _parse_csv("stdin", content)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from None
    return _parse_csv(str(path), content) if path.suffix.lower() == ".csv" else jsonl.parse(str(path), content)


def _parse_csv(name: str, content: bytes) -> JsonLines:
    """A header of `COLUMNS`, the last may be missing; its cell holds the choices with | between them, or nothing."""
    reader = csv.reader(io.StringIO(jsonl.decode(name, content), newline=""), strict=True)
    found, begins = JsonLines(name, [], []), 1
    header: list[str] | None = None
    try:
        for row in reader:
            line, begins = begins, reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _header(name, row)
                continue
            if len(row) != len(header):
                raise InvalidInput(f"{name}:{line}: {len(row)} columns; the header has {len(header)}")
            found.objects.append(_example(dict(zip(header, row, strict=True))))
            found.lines.append(line)
    except csv.Error as error:
        raise InvalidInput(f"{name}:{begins}: not CSV ({error})") from None
    return found


def _header(name: str, row: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in row]
    if not {"prompt", "completion"} <= set(header) <= set(COLUMNS) or len(set(header)) < len(header):
        raise InvalidInput(
            f"{name}:1: the first line must name the columns: {', '.join(COLUMNS)}; choices may be left out"
        )
    return header


def _example(cells: dict[str, str]) -> object:
    choices = cells.pop("choices", "")
    return cells | ({"choices": choices.split(CHOICES_BETWEEN)} if choices else {})

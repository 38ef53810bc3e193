"""JSON Lines files of examples, with errors that name the file and the line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from service.errors import InvalidInput

PARAM = re.compile(r"(examples|validation|test)\[(\d+)\]\.?(.*)", re.DOTALL)


@dataclass(frozen=True)
class JsonLines:
    """The objects of a file and the line, from 1, that each stands on."""

    name: str
    objects: list[object]
    lines: list[int]


def decode(name: str, content: bytes) -> str:
    """The text of a file of this name, without the mark that some editors begin it with.

    Raises:
        InvalidInput: it is no text.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InvalidInput(f"{name}:{line}: not UTF-8 text") from None


def parse(name: str, content: bytes) -> JsonLines:
    """The lines of a file of this name; empty ones are skipped.

    Raises:
        InvalidInput: a line is not JSON.
    """
    text = decode(name, content)
    found = JsonLines(name, [], [])
    # Not splitlines: it would also split at U+2028 inside a string.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_refuse)
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
            found.objects.append(value)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be decoded"
            raise InvalidInput(
                f'{name}:{number}: not JSON ({reason}); a line is {{"prompt": "...", "completion": "..."}}'
            ) from None
        found.lines.append(number)
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def locate(error: InvalidInput, files: dict[str, JsonLines]) -> InvalidInput:
    """The same error with `examples[3].completion` told as a line of the file that the examples came from."""
    match = PARAM.fullmatch(error.param or "")
    file = files.get(match[1]) if match else None
    if match is None or file is None or int(match[2]) >= len(file.lines):
        return error
    place = f"{file.name}:{file.lines[int(match[2])]}"
    return type(error)(f"{place}: {match[3]}: {error.message}" if match[3] else f"{place}: {error.message}")

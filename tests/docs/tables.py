"""Tables of docs/operating.md, made from the settings and the errors."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from service.errors import C2IError
from service.settings import Settings

# What whoever gets an error does. A new error needs its line here, or the test of the page fails.
ADVICE = {
    "invalid_request": "Correct the field that `param` names.",
    "unusable_model": "Take another model; the message says what is wrong with this one.",
    "unauthenticated": "Send `Authorization: Bearer KEY`; `c2i keys list` shows which keys are in force.",
    "forbidden": "Make a key with the scope that the message names: `c2i keys create --scopes`.",
    "wrong_content_type": "Send `Content-Type: application/json`.",
    "payload_too_large": "Send fewer or shorter examples.",
    "not_found": "Look at the path; `/docs` lists the routes, `GET /v1/jobs/{id}/files` the files.",
    "model_not_found": "`c2i models` lists what is installed; `c2i models add ID` installs.",
    "job_not_found": "Look at the ID. Jobs are forgotten `C2I_JOB_TTL_SECONDS` after their end, other keys' hidden.",
    "method_not_allowed": "`/docs` lists the methods of each route.",
    "conflict": "Ask for the job again: wait until it has ended, or do not stop what has.",
    "too_many_requests": "Wait for `Retry-After` seconds. Operator: the settings `C2I_MAX_...`.",
    "unavailable": "Try again after `Retry-After`. Operator: `/readyz` says whether it is Redis or the disk.",
    "out_of_memory": "Fewer or shorter examples, a smaller model; or more memory, a higher `C2I_JOB_MEMORY_BYTES`.",
    "out_of_disk": "Make room, or raise `C2I_JOB_DISK_BYTES`: a job writes a copy of its model, with "
    "`compress` one a round, and one more for `quantize`, `gguf`, `laser` or `c2i`.",
    "timed_out": "Fewer examples or passes; or a higher `C2I_JOB_TIMEOUT_SECONDS`.",
    "worker_died": "The worker's log and `dmesg` say more: most often memory had ended. Submit it again.",
    "internal_error": "Try again; if it stays, the log line with the answer's `X-Request-Id` says where it failed.",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A cell is one line."""
    lines = [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)
    ]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def settings_table() -> str:
    """Every setting, its default and what its docstring says."""
    docs = attribute_docs(Settings)
    rows = []
    for name, field in Settings.model_fields.items():
        variable = str(field.validation_alias or f"C2I_{name}").upper()
        rows.append((f"`{variable}`", _kind(field.annotation), _value(field.default), docs.get(name, "")))
    return table(("setting", "type", "default", ""), rows)


def errors_table() -> str:
    """Every error: its code, what it means, and what to do."""
    kinds = sorted(
        (kind for kind in _tree(C2IError) if kind is not C2IError), key=lambda kind: (kind.status, kind.code)
    )
    rows = [(f"`{kind.code}`", str(kind.status), (kind.__doc__ or "").strip(), ADVICE[kind.code]) for kind in kinds]
    return table(("code", "status", "meaning", "what to do"), rows)


def enum_members(name: str) -> dict[str, str]:
    """The values of one of the contract's enumerations, with their docstrings."""
    for kind in StrEnum.__subclasses__():
        if kind.__name__ == name and kind.__module__.startswith("service."):
            docs = attribute_docs(kind)
            return {member.value: docs.get(member.name, "") for member in kind}
    return {}


def attribute_docs(kind: type) -> dict[str, str]:
    """What stands below each attribute of a class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    statements = body.body if isinstance(body, ast.ClassDef) else []
    docs = {}
    for statement, after in pairwise(statements):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        match after:
            case ast.Expr(value=ast.Constant(value=str(text))) if isinstance(target, ast.Name):
                docs[target.id] = " ".join(text.split())
    return docs


def _tree(kind: type[C2IError]) -> Iterable[type[C2IError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


def _kind(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "`on`, `off`", Path: "path"}
    options = [option for option in get_args(annotation) or (annotation,) if option is not NoneType]
    return ", ".join(names[option] if isinstance(option, type) else f"`{option}`" for option in options)


def _value(default: Any) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return "`on`" if default else "`off`"
        case int() if default >= 10_000:
            return f"`{default}` ({default:,})"
        case _:
            return f"`{default}`"

"""docs/api.md, made from the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.docs.curls import CURLS
from tests.docs.tables import enum_members, table
from tests.test_keys import NEEDS

Schema = dict[str, Any]

INTRODUCTION = """\
# HTTP API

Every route with its parameters, bodies, answers, errors and a command that calls it.

<!-- Made by `python -m tests.docs` from the OpenAPI document; edit the routes, or tests/docs. -->

The same as a machine reads it: `/openapi.json`; to read in a browser: `/docs`.

- Bodies are JSON in UTF-8. Times are ISO 8601 in UTC. IDs are opaque.
- In the commands `JOB` is a job's ID and `job.json` a body of [`POST /v1/jobs`](#post-v1jobs). What follows `#` is the
  status of the answer.
- Where keys are in force, send `Authorization: Bearer KEY` (`curl -H "Authorization: Bearer $C2I_KEY"`). The column
  *key* names the scope that a key needs; `admin` covers the others. What belongs to another key's owner is answered as
  what does not exist.
- Every error is `{"error": {"code", "message", "param"}}`. Programs look at `code`; [operating.md](operating.md#errors)
  says what each means and what to do. `param` names the field as the client wrote it: `examples[3].completion`.
- 429 and 503 come with `Retry-After` in seconds. A `POST /v1/jobs` that may be repeated needs an `Idempotency-Key`.
- `X-Request-Id` is taken from the request, or made, and is in every answer and log line of it.

A body of `POST /v1/jobs`, cut short (eight examples at least are needed):

```json
{"model": "smollm2-135m-instruct", "passes": 4, "examples": [
  {"prompt": "Review: A joy from start to end.\\nSentiment:", "completion": " good", "choices": [" good", " bad"]},
  {"prompt": "Review: I want my two hours back.\\nSentiment:", "completion": " bad", "choices": [" good", " bad"]}
]}
```
"""


def operations(document: Schema) -> Iterator[tuple[str, str, Schema]]:
    """Method, path and operation of each route, in the document's order."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def api_page(document: Schema) -> str:
    """The whole page."""
    rows, sections = [], []
    for method, path, operation in operations(document):
        name = f"{method} {path}"
        summary = operation["description"].splitlines()[0]
        rows.append((f"[`{name}`](#{anchor(name)})", summary, _scope(method, path, operation)))
        sections.append(_section(method, path, operation))
    schemas = document["components"]["schemas"]
    shown = [_schema(name, schema) for name, schema in sorted(schemas.items())]
    routes = table(("route", "", "key"), rows)
    return "\n".join([INTRODUCTION, "## Routes\n", routes, "", *sections, "## Bodies\n", *shown]).rstrip() + "\n"


def anchor(heading: str) -> str:
    """Where GitHub's renderer puts a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _scope(method: str, path: str, operation: Schema) -> str:
    if "security" not in operation:
        return "none"
    # A path parameter that spans slashes is `{path:path}` to the router.
    return next(str(scope.value) for (m, p), scope in NEEDS.items() if (m, re.sub(r":\w+\}", "}", p)) == (method, path))


def _section(method: str, path: str, operation: Schema) -> str:
    parts = [f"### `{method} {path}`", operation["description"].strip()]
    parameters = [
        (f"`{p['name']}`", p["in"], kind(p["schema"]), _default(p["schema"], p["required"]), p.get("description", ""))
        for p in operation.get("parameters", [])
    ]
    if parameters:
        parts.append(table(("parameter", "in", "type", "default", ""), parameters))
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]
        parts.append("Body: " + ", ".join(_content(*item) for item in content.items()) + ".")
    answers, errors = [], []
    for status, response in sorted(operation["responses"].items()):
        if status.isdecimal() and int(status) >= 400:
            codes = re.findall(r"^`(\w+)`:", response["description"], re.MULTILINE)
            errors.append(f"{status} {', '.join(f'`{code}`' for code in codes)}".strip())
        else:
            answers.append(_answer(status, response))
    parts.append("\n".join(answers))
    if errors:
        parts.append(f"Errors: {'; '.join(errors)}.")
    parts.append(f"```sh\n{CURLS[method, path]}\n```")
    return "\n\n".join(parts) + "\n"


def _answer(status: str, response: Schema) -> str:
    what = ", ".join(_content(*item) for item in response.get("content", {}).items()) or (
        "no body" if status == "204" else "bytes"
    )
    description = response["description"]
    return f"- {status}: {what}" + ("" if description == "Successful Response" else f". {description}")


def _content(media_type: str, content: Schema) -> str:
    schema = content.get("schema", {})
    if media_type == "application/json":
        return kind(schema)
    return f"`{media_type}`" + (f" of {kind(schema)}" if "properties" in schema or "$ref" in schema else "")


def kind(schema: Schema) -> str:
    """A JSON schema in words: `list of [Example](#example)`, `integer, 1 to 8`, `string or null`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    if "anyOf" in schema:
        options = dict.fromkeys(kind(option) for option in schema["anyOf"])
        return (", or " if any(", " in option for option in options) else " or ").join(options)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return "list of " + ", ".join(kind(item) for item in schema["prefixItems"])
        case "array":
            return f"list of {kind(schema.get('items', {}))}{_bounds(schema, 'minItems', 'maxItems', ' of them')}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"map to {kind(schema['additionalProperties'])}"
        case "string" if "format" in schema:
            return {"date-time": "time", "binary": "bytes"}.get(schema["format"], str(schema["format"]))
        case "string":
            return f"string{_bounds(schema, 'minLength', 'maxLength', ' characters')}"
        case "integer" | "number" as number:
            return f"{number}{_bounds(schema, 'minimum', 'maximum')}"
        case str(other):
            return other
        case _:
            return "any"


def _bounds(schema: Schema, low: str, high: str, unit: str = "") -> str:
    least, most = schema.get(low, schema.get("exclusiveMinimum")), schema.get(high, schema.get("exclusiveMaximum"))
    above, below = "over " if "exclusiveMinimum" in schema else "", "under " if "exclusiveMaximum" in schema else ""
    if least is not None and most is not None:
        return f", {above}{int(least):,} to {below}{int(most):,}{unit}"
    if most is not None:
        return f", {below or 'at most '}{int(most):,}{unit}"
    if least is not None:
        return f", {above or 'at least '}{int(least):,}{unit}"
    return ""


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default in (None, {}) else f"`{default}`".replace("True", "true").replace("False", "false")


def _schema(name: str, schema: Schema) -> str:
    parts = [f"### {name}"]
    if text := schema.get("description"):
        parts.append(" ".join(line for line in text.split("\n") if line))
    members = enum_members(name) if "enum" in schema else {}
    if members:
        parts.append(table(("value", ""), [(f"`{value}`", members.get(value, "")) for value in schema["enum"]]))
    elif "enum" in schema:
        parts.append(kind(schema))
    if fields := schema.get("properties"):
        required = schema.get("required", [])
        rows = [
            (f"`{field}`", kind(of), _default(of, field in required), of.get("description", ""))
            for field, of in fields.items()
        ]
        parts.append(table(("field", "type", "default", ""), rows))
    return "\n\n".join(parts) + "\n"

"""`report.html`: the result as the page shows it, in one file that needs neither the service nor a network.

The page's own files are inlined. Its script is one module: the vendored libraries and the result's modules in the order
in which they need each other, without their imports. A Content-Security-Policy names the hash of this script, so that
nothing else runs, whatever an example's text holds; the figures also stand in the file as plain HTML.
https://developer.mozilla.org/en-US/docs/Web/HTTP/Guides/CSP
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape
from pathlib import Path

from service.curves import filled
from service.jobs import Difference
from service.reports import Metrics, Report

WEB = Path(__file__).parent / "web"
STYLES = ("theme.css", "result.css")
SCRIPTS = (
    "vendor/d3-7.9.2.min.js",
    "vendor/plot-0.6.17.umd.min.js",
    "result-elements.js",
    "result-charts.js",
    "result.js",
)
# Behind the modules: draw the report, and on paper unfold what is short. The long tables are in report.json, too.
DRAW = """
renderResult(document.querySelector("main"), JSON.parse(document.querySelector("#report").textContent));
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open ||= fold.querySelectorAll("tr").length <= 25;
});
"""
LAYOUT = """
main, header { max-width: 76rem; margin: 0 auto; padding: 16px; }
header { padding-bottom: 0; }
h1 { margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
noscript p { padding: 8px 12px; border: 1px solid var(--line); }
@page { margin: 14mm; }
@media print { body { background: none; font-size: 10pt; } main, header { max-width: none; padding: 0 0 8pt; } }
"""


def render(report: Report) -> str:
    """The whole file. It loads nothing, and keeps its figures where no script runs."""
    script, script_hash = _script()
    policy = f"default-src 'none'; script-src '{script_hash}'; style-src 'unsafe-inline'; base-uri 'none'"
    # No `<` is left: a text cannot end the element, nor begin a comment within it.
    data = report.model_dump_json().replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(report.model.id)}: adaptation report</title>
<style>{_styles()}</style>
</head>
<body>
<header><h1>Compress to Impress: {escape(report.model.id)}</h1></header>
<main>
{_figures(report)}
</main>
<noscript><p>Charts, examples and details are drawn by a script, and none runs here.</p></noscript>
<script type="application/json" id="report">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


@cache
def _styles() -> str:
    return "\n".join([*((WEB / name).read_text() for name in STYLES), LAYOUT])


@cache
def _script() -> tuple[str, str]:
    """The modules as one, and its hash as a policy names it."""
    modules = "\n".join((WEB / name).read_text() for name in SCRIPTS)
    joined = re.sub(r"^import [^;]*;$|^export ", "", modules, flags=re.MULTILINE) + DRAW
    digest = base64.b64encode(hashlib.sha256(joined.encode()).digest()).decode()
    return joined, f"sha256-{digest}"


def _figures(report: Report) -> str:
    rows = [
        _row("Accuracy over the choices", "accuracy", report),
        _row("Exact match", "exact_match", report),
        _row("Loss, nats", "loss", report),
    ]
    return f"""<p>{escape(report.verdict)}</p>
<table>
<thead><tr><th></th><th>base</th><th>adapted</th><th>difference (95 % interval)</th></tr></thead>
<tbody>{"".join(rows)}</tbody>
</table>
{_curve(report)}
<p>{report.removed.of(report.model.components)} removed in {report.removed.modules} of
{report.model.target_modules} weights; {escape(str(report.drift))}. {escape(report.outlook.message)}</p>"""


def _curve(report: Report) -> str:
    if not report.curve:
        return ""
    columns, rows = filled(report)
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>\n</table>"


def _row(name: str, metric: str, report: Report) -> str:
    value = _value(report.base, metric)
    if value is None:
        return ""
    found = next((d for d in report.differences if d.metric == metric), None)
    cells = [f"{value:.3f}", f"{_value(report.adapted, metric):.3f}", _change(found)]
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _value(metrics: Metrics, name: str) -> float | None:
    found: float | None = getattr(metrics, name)
    return found


def _change(found: Difference | None) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})" if found else ""

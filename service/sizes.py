"""What base and result weigh and how fast they are, as a table for a terminal and a model card."""

from __future__ import annotations

from service.reports import Report, Speed

HEADER = ["", "weights", "memory", "prompt", "decoding", "energy"]


def size_rows(report: Report) -> list[list[str]]:
    """A row each for base, result and its quantized form, as `HEADER` names them; none where nothing was measured."""
    if report.speed is None:
        return []
    shown = [("base", report.speed.base), ("adapted", report.speed.model)]
    if report.speed.quantized and report.quantized:
        shown.append((f"adapted, {report.quantized.bits}", report.speed.quantized))
    rows = [[name, *_cells(speed)] for name, speed in shown]
    used = [k for k in range(len(HEADER)) if not k or any(row[k] for row in [*rows])]
    return [[row[k] for k in used] for row in [HEADER, *rows]]


def _cells(speed: Speed) -> list[str]:
    decode, joules = speed.decode_tokens_per_second, speed.joules_per_token
    return [
        f"{speed.bytes / 1e6:,.1f} MB",
        f"{speed.peak_memory_bytes / 1e6:,.0f} MB",
        f"{speed.prefill_tokens_per_second:,.0f} tokens/s",
        "" if decode is None else f"{decode:,.1f} tokens/s",
        "" if joules is None else f"{joules:.2g} J a token",
    ]

"""The base and every point of `compress` as the lines of a table, for whoever shows them."""

from __future__ import annotations

from dataclasses import dataclass

from service.reports import Report, Speed


@dataclass(frozen=True)
class Line:
    """One model."""

    name: str
    """`base`, `point 2`."""
    parameters: float
    """As a fraction of the base's, as `bytes` is."""
    bytes: float
    accuracy: float | None
    exact_match: float
    loss: float | None
    speed: Speed | None

    @property
    def cells(self) -> list[str]:
        """Under `COLUMNS`."""
        scores = (self.accuracy, self.exact_match, self.loss)
        sizes = [f"{100 * size:.1f} %" for size in (self.parameters, self.bytes)]
        decoding = self.speed.decode_tokens_per_second if self.speed else None
        shown = ["" if score is None else f"{score:.3f}" for score in scores]
        return [self.name, *sizes, *shown, f"{decoding:.1f}" if decoding else ""]


COLUMNS = ("model", "parameters", "bytes", "accuracy", "exact match", "loss", "tokens a second")


def lines(report: Report) -> list[Line]:
    """The base, then each point; none without a curve."""
    if not report.curve:
        return []
    base = report.base
    speed = report.speed.base if report.speed else None
    return [Line("base", 1.0, 1.0, base.accuracy, base.exact_match, base.loss, speed)] + [
        Line(f"point {p.number}", p.parameters, p.bytes, p.accuracy, p.exact_match, p.loss, p.speed)
        for p in report.curve
    ]


def filled(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns that have something in them, and the cells below."""
    cells = [line.cells for line in lines(report)]
    kept = [k for k in range(len(COLUMNS)) if any(row[k] for row in cells)]
    return [COLUMNS[k] for k in kept], [[row[k] for k in kept] for row in cells]

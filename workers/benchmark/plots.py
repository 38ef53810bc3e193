"""Two plots: accuracy against cost for all methods, and how far predicted losses can be relied on."""

from __future__ import annotations

from workers.benchmark.records import Records


def write_plots(records: Records) -> None:
    """Write `accuracy_by_cost.png` and `reliability.png`."""

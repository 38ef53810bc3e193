"""`results.md`: one table over all tasks, then one a task, made from `bench.json` alone."""

from __future__ import annotations

from workers.benchmark.records import Records


def write_tables(records: Records) -> None:
    """Write `results.md`."""

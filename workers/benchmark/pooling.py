"""What a method changes on one task over several seeds, whose test splits may share rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from workers.benchmark.records import Row


def pooled(rows: Sequence[Row], *, exact: bool = False) -> tuple[int, int]:
    """How many rows of the task's file are gained over the base, and how many are lost: each counts once, by what
    more of the seeds say whose test splits have it. Of rows of before 2026-12, which do not tell their lines, every
    seed's count apart.

    Args:
        rows: one method on one task.
        exact: in exact match, not in the metric.
    """
    net: Counter[int] = Counter()
    gained = lost = 0
    for row in rows:
        if row.lines is None:
            gained += row.exact_gained if exact else row.gained
            lost += row.exact_lost if exact else row.lost
        else:
            net.update(row.lines.exact_gained if exact else row.lines.gained)
            net.subtract(row.lines.exact_lost if exact else row.lines.lost)
    gained += sum(count > 0 for count in net.values())
    lost += sum(count < 0 for count in net.values())
    return gained, lost

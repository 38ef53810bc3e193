"""Tables of README's "Measured", made from the run that is recorded in docs/benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.docs.tables import table
from tests.live import REPOSITORY
from workers.benchmark.records import Records, Row
from workers.benchmark.tables import mean, metric

TASKS = {
    "counterfact": "CounterFact °",
    "qa_wikidata": "QA WikiData °",
    "landmark_continent": "landmark_continent",
    "clinc_domain": "CLINC domain",
    "fever": "FEVER",
    "sms_spam": "SMS spam",
    "epistemic_reasoning": "epistemic reasoning",
    "truthfulqa_pointwise": "TruthfulQA, pointwise",
    "sports_understanding": "sports understanding",
    "strategyqa": "StrategyQA",
    "arc_easy": "ARC easy",
    "commonsenseqa": "CommonsenseQA",
}
METHODS = {
    "base": "base",
    "majority": "majority class",
    "fewshot": "few-shot, 8 examples",
    "lora": "LoRA, r = 8",
    "components:1": "components, 1 pass",
    "components:8": "components, up to 8 passes",
}
PEERS = {"base": "base", "laser": "LASER", "c2i": "Compress to Impress", "components:1": "components, 1 pass"}
SEEDS = 3


def recorded() -> list[Row]:
    """All rows of the run."""
    return Records(REPOSITORY / "docs" / "benchmark").rows()


def methods_table() -> str:
    """Each method on each task, the mean over its seeds, and its means over the tasks."""
    by_method = {method: [row for row in recorded() if row.method == method] for method in METHODS}
    lines = []
    for task, name in TASKS.items():
        of_task = [[row for row in rows if row.task == task] for rows in by_method.values()]
        lines.append((name, *(_accuracy(rows) for rows in of_task)))
    means: list[tuple[str, Callable[[Row], float | None], str]] = [
        ("mean", metric, ".3f"),
        ("mean exact match", lambda row: row.exact_match, ".3f"),
        ("mean balanced accuracy", lambda row: row.balanced_accuracy, ".3f"),
        ("mean drift, nats a token", lambda row: row.drift, ".2f"),
        ("mean cost, FB", lambda row: row.fb, ".1f"),
    ]
    for name, of, form in means:
        lines.append((name, *(_mean(rows, of, form) for rows in by_method.values())))
    return table(("task", *METHODS.values()), lines)


def peers_table() -> str:
    """The papers' searches on seed 0, beside one pass."""
    rows = {(row.task, row.method): row for row in recorded() if row.seed == 0}
    lines = []
    for task, name in TASKS.items():
        found = [rows.get((task, method)) for method in PEERS]
        if rows.keys() & {(task, "laser"), (task, "c2i")}:
            lines.append((name, *(_with_cost(row) for row in found)))
    return table(("task", *PEERS.values()), lines)


def _accuracy(rows: Sequence[Row]) -> str:
    return _short(f"{mean(rows, metric):.3f}") + (f" ({len(rows)})" if len(rows) < SEEDS else "")


def _mean(rows: Sequence[Row], of: Callable[[Row], float | None], form: str) -> str:
    known = [row for row in rows if of(row) is not None]
    return _short(f"{mean(known, lambda row: of(row) or 0.0):{form}}") if known else ""


def _with_cost(row: Row | None) -> str:
    if row is None:
        return ""
    return _short(f"{metric(row):.3f}") + ("" if row.method == "base" else f", {row.fb:.0f} FB")


def _short(number: str) -> str:
    """`.311` for `0.311`."""
    return number.removeprefix("0") if number.startswith("0.") and float(number) else number

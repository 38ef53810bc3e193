"""The figure of docs/method.md, from a real run of one pass.

    python -m tests.docs.figure

The task and the model are those of `make demo`: 100 examples to rank by, 100 to select on, 300 to test on. It takes as
long as the job does, and longer where the model has to be downloaded and decomposed first.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from service import models
from service.decomposed import SPECTRA
from service.jobs import JobSpec
from service.reports import Candidate, Report
from service.settings import Settings
from tests.docs.pages import DOCS
from workers.adaptation import adapt, encode_for, layout_for
from workers.benchmark.plots import COLOURS
from workers.catalogue import SMOLLM2, add_model
from workers.demo.task import build_task
from workers.gradients import effects
from workers.loading import load
from workers.ranking import t_scores
from workers.spectrum import SpectrumCache
from workers.targets import find_targets

ROWS = (100, 100, 300)


def make_figure(spec: JobSpec, model: models.Model, cache: Path, out: Path, title: str) -> Report:
    """Run a job, draw it to `out`, and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = adapt(spec, model, Path(folder), cache=cache, on_progress=lambda *_: None)
    draw(report, t_of_every_component(spec, model, cache / SPECTRA), out, title)
    return report


def t_of_every_component(spec: JobSpec, model: models.Model, cache: Path) -> dict[tuple[str, int], float]:
    """t of each component of the base model, on the job's gradient split."""
    base = load(model.folder)
    encoded = encode_for(
        base, spec.examples, prompt_format=spec.prompt_format, context=model.context_length, name="examples"
    )
    targets, _ = find_targets(base.model)
    spectra_cache = SpectrumCache(cache)
    spectra = {target.name: spectra_cache.get(target.weight) for target in targets}
    found, _ = effects(base.model, targets, spectra, encoded, spec.objective, layout_for(base, encoded))
    return {(name, i): t for name, a in found.by_module.items() for i, t in enumerate(t_scores(a).tolist())}


def draw(report: Report, t: dict[tuple[str, int], float], out: Path, title: str) -> None:
    """Two panels: t of all components by rank, the removed ones marked; predicted against actual loss."""
    with mpl.rc_context({"svg.hashsalt": "c2i", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _by_rank(left, report, t)
        _by_prediction(right, report)
        figure.suptitle(title, fontsize=9)
        figure.savefig(out, metadata={"Date": None}, facecolor="white")


def _by_rank(axes: Axes, report: Report, t: dict[tuple[str, int], float]) -> None:
    removed = {(entry.module, i) for entry in report.plan for i in entry.components}
    ranked = sorted(t, key=lambda one: -t[one])
    heights = Tensor([t[one] for one in ranked])
    ranks = torch.arange(1, len(ranked) + 1)
    axes.plot(ranks, heights, color="0.55", lw=1.2, label=f"all {len(ranked):,} components")
    at = [k for k, one in enumerate(ranked) if one in removed]
    axes.plot(ranks[at], heights[at], "o", ms=3.2, color=COLOURS[1], label=f"the {len(removed):,} removed")
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.set(xscale="log", xlabel="rank by t", ylabel="t over the gradient split")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)


def _by_prediction(axes: Axes, report: Report) -> None:
    """As falls, and not as losses: most plans are judged on a part of the examples, whose loss is another."""
    tried = [
        (c, c.base_loss - c.predicted_loss, c.base_loss - c.loss)
        for c in report.passes[0].candidates
        if c.predicted_loss is not None and c.loss is not None
    ]
    # Marker, colour, and where the size is written: above, or below.
    kinds = {
        "one by itself": ("s", COLOURS[3], 3),
        "by t": ("o", COLOURS[0], 3),
        "by moderated t": ("^", COLOURS[2], -9),
    }
    for kind, (marker, colour, above) in kinds.items():
        mine = [(c.size, predicted, fall) for c, predicted, fall in tried if _kind(c) == kind]
        axes.plot([x for _, x, _ in mine], [y for *_, y in mine], marker, ms=5, color=colour, label=kind)
        for size, x, y in mine:
            if size > 1:
                axes.annotate(f"{size}", (x, y), (4, above), textcoords="offset points", size=7)
    most = max(fall for *_, fall in tried)
    line = torch.linspace(0.1, most, 50)
    axes.plot(line, line, color="0.55", lw=1, label="as predicted")
    axes.set(
        xscale="log",
        xlim=(0.1, 40),
        xlabel="fall in loss predicted to first order",
        ylabel="fall in loss on the selection split",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="lower right", title="components removed")


def _kind(candidate: Candidate) -> str:
    if candidate.size == 1:
        return "one by itself"
    return next((kind for kind in ("by moderated t", "by t") if candidate.description.endswith(kind)), "a list and one")


def main() -> None:
    """Run the job and draw it."""
    settings = Settings.load()
    model = models.resolve(settings.models, add_model(SMOLLM2, settings.data).name)
    task = build_task()
    rows = [example.model_dump() for example in [*task.examples, *task.test]]
    g, s, n = ROWS
    splits = {"examples": rows[:g], "validation": rows[g : g + s], "test": rows[g + s : g + s + n]}
    spec = JobSpec.parse({"model": model.id, **splits})
    title = f"{model.id}, the task of `make demo`, one pass, {g}/{s}/{n} rows, {datetime.now(UTC):%Y-%m-%d}"
    report = make_figure(spec, model, settings.cache, DOCS / "method.svg", title)
    sys.stdout.write(f"{report.verdict}\n")


if __name__ == "__main__":
    main()

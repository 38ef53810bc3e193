"""Once on a real model: its effects are slopes of its loss, and an adaptation lowers that loss."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from service import models
from service.estimates import EFFICIENCY, Loads, Size, estimate, forward_backward
from service.jobs import Example, JobSpec, Objective, PromptFormat
from service.reports import Report
from service.settings import Settings
from tests import plain
from workers.adaptation import adapt
from workers.evaluation import evaluate
from workers.examples import Layout, encode
from workers.gradients import effects
from workers.loading import load
from workers.progress import Clock
from workers.spectrum import decompose
from workers.targets import find_targets

# One thread: on a busy machine two that wait for each other are ten times slower, on an idle one hardly faster.
pytestmark = pytest.mark.usefixtures("one_thread")

CONTINENTS = {
    " Europe": "Paris Lisbon Oslo Vienna Prague Athens Dublin Warsaw Madrid Rome Helsinki Berlin",
    " Asia": "Tokyo Hanoi Delhi Seoul Bangkok Beijing Jakarta Manila Kabul Tehran Baghdad Kathmandu",
    " Africa": "Cairo Nairobi Lagos Accra Tunis Dakar Kampala Luanda Harare Khartoum Kigali Maputo",
}


def examples() -> list[Example]:
    """Cities and their continents, in turn."""
    lists = [[(city, continent) for city in cities.split()] for continent, cities in CONTINENTS.items()]
    return [
        Example(prompt=f"City: {city}. Continent:", completion=continent, choices=list(CONTINENTS))
        for row in zip(*lists, strict=True)
        for city, continent in row
    ]


def test_effects_are_slopes_of_the_loss_in_double_precision(smollm2: Path) -> None:
    base = load(smollm2)
    with plain.double_throughout():
        model = base.model.double()
        rows = encode(examples()[:3], base.tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")
        targets, skipped = find_targets(model)
        assert (len(targets), skipped) == (210, [])
        names = ("model.layers.0.self_attn.k_proj", "model.layers.15.mlp.down_proj", "model.layers.29.mlp.up_proj")
        chosen = [target for target in targets if target.name in names]
        spectra = {target.name: decompose(target.weight) for target in chosen}
        found, _ = effects(model, chosen, spectra, rows, Objective.BOTH, Layout(packed=True))
        for target in chosen:
            a = found.by_module[target.name]
            for i in (0, 50):
                B, A = spectra[target.name].factors(target.weight, [i])
                # The component grown and shrunk by a ten thousandth of itself.
                with plain.nudged(target.weight, 1e-4 * B @ A):
                    up = evaluate(model, rows, Objective.BOTH, Layout(packed=False)).loss
                with plain.nudged(target.weight, -1e-4 * B @ A):
                    down = evaluate(model, rows, Objective.BOTH, Layout(packed=False)).loss
                slope = torch.from_numpy(up - down) / 2e-4
                torch.testing.assert_close(a[:, i], slope, rtol=1e-3, atol=1e-6 * float(a.abs().max()))


# peft 0.21 asks transformers 5 for a property under its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adaptation_lowers_the_loss(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both clocks of the job: with one thread it takes as long by this one, however busy others keep the machine.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    monkeypatch.setattr("workers.search.Clock", partial(Clock, now=time.process_time))
    rows = [example.model_dump() for example in examples()]
    model = models.resolve(smollm2.parent, smollm2.name)
    spec = JobSpec.parse({"model": smollm2.name, "examples": rows[:12], "validation": rows[12:24], "test": rows[24:]})
    cache = Settings.load().cache  # the project's own: decomposed once for all tests and jobs
    report: Report = adapt(spec, model, tmp_path, cache=cache, on_progress=lambda *step: None)
    assert report.passes[0].accepted
    assert report.passes[0].loss < 0.8 * report.passes[0].base_loss
    assert report.improved
    assert report.adapted.loss < report.base.loss
    assert report.removed.components >= 1
    assert report.verification.adapter is not None and report.verification.adapter < 1e-3
    assert report.verification.model < 1e-3
    # A small adapter of a large model.
    assert report.cost.adapter_bytes < report.cost.model_bytes / 20
    check_estimate(spec, model, report)


def check_estimate(spec: JobSpec, model: models.Model, report: Report) -> None:
    """What `dry_run` tells is within a factor of two of what the job took, told the speed that the job ran at."""
    size, loads = Size.of(model.shapes, model.bytes), Loads.of(spec, model)
    speed = forward_backward(size, loads) / report.cost.fb_seconds / EFFICIENCY
    told = estimate(size, loads, spec, speed=speed, decomposed=True)
    stages = {name: seconds for name, seconds in report.cost.stages.items() if name != "decomposing"}
    took = sum(stages.values())
    assert took / 2 < told.seconds < 2 * took, (told.stages, stages)
    assert report.cost.peak_memory_bytes / 2 < told.memory_bytes < 2 * report.cost.peak_memory_bytes
    written = report.cost.adapter_bytes + report.cost.model_bytes
    assert written / 2 < told.disk_bytes < 2 * written

"""A cell: one task with one seed, made ready once for all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from service import jsonl
from service.errors import InvalidInput
from service.jobs import Objective, PromptFormat
from service.models import Model
from workers.adaptation import encode_for, layout_for
from workers.batching import in_batches
from workers.benchmark.clock import now
from workers.benchmark.tasks import Split
from workers.drift import NeutralText, encode_neutral, paragraphs
from workers.evaluation import Outcome, evaluate, losses, score
from workers.examples import Batch, Encoded, Layout
from workers.gradients import Checkpointing, frozen, want_gradient
from workers.loading import Checkpoint
from workers.spectrum import Spectrum, SpectrumCache
from workers.subject import Subject
from workers.targets import Target, find_targets

OBJECTIVE = Objective.BOTH
"""Of every method, LoRA's training too: the default of a job."""


@dataclass(frozen=True, eq=False)
class Bench:
    """The base model with its targets and their components, loaded once for all cells."""

    model: Model
    base: Checkpoint
    targets: Sequence[Target]
    spectra: Mapping[str, Spectrum]
    decompose: Callable[[Tensor], Spectrum]
    neutral: NeutralText

    @classmethod
    def prepare(cls, model: Model, base: Checkpoint, cache: Path) -> Bench:
        """Decompose, and note what the base predicts on neutral text.

        Args:
            model: an installed model that `service.models.resolve` has checked.
            base: its checkpoint, loaded.
            cache: the data folder's cache, which holds the decompositions.
        """
        targets, _ = find_targets(base.model)
        decompose = SpectrumCache(cache / "spectra").get
        spectra = {target.name: decompose(target.weight) for target in targets}
        texts = encode_neutral(paragraphs(), base.tokenizer, model.context_length)
        subject = Subject(base.model, targets, spectra, OBJECTIVE, layout_for(base, texts))
        neutral = NeutralText(subject, texts, masked=base.masked)
        neutral.record()
        return cls(model, base, targets, spectra, decompose, neutral)


@dataclass(frozen=True, eq=False)
class Encodings:
    """A task's three splits in tokens."""

    gradient: list[Encoded]
    selection: list[Encoded]
    test: list[Encoded]
    test_lines: list[int]
    """Where the test split's rows stand in the task's file."""


@dataclass(frozen=True, eq=False)
class Cell:
    """What every method starts from."""

    task: str
    seed: int
    bench: Bench
    rows: Encodings
    subject: Subject
    fb_seconds: float
    base: Outcome
    """The base model on the test split."""
    base_seconds: float
    """Of that evaluation."""

    @property
    def layout(self) -> Layout:
        """How the base model takes this cell's rows."""
        return self.subject.layout

    def test(self) -> tuple[Outcome, float]:
        """The model as it stands on the test split, and the seconds that took."""
        started = now()
        outcome = evaluate(self.bench.base.model, self.rows.test, OBJECTIVE, self.layout)
        return outcome, now() - started


def encode_split(base: Checkpoint, split: Split, context: int | None) -> Encodings:
    """Tokenise a cell's rows.

    Args:
        context: most tokens that the model takes; None for no limit.

    Raises:
        InvalidInput: the file and line of an example that is too long, or that the tokenizer leaves nothing of.
    """
    try:
        gradient, selection, test = (
            encode_for(base, examples, prompt_format=PromptFormat.TEXT, context=context, name=name)
            for name, examples in (("examples", split.gradient), ("validation", split.selection), ("test", split.test))
        )
    except InvalidInput as error:
        raise jsonl.locate(error, split.files) from None
    return Encodings(gradient, selection, test, split.files["test"].lines)


def prepare(bench: Bench, task: str, seed: int, rows: Encodings, fb_seconds: float | None = None) -> Cell:
    """Lay the rows out, measure one FB and the base model.

    Args:
        fb_seconds: of this cell, where it was measured before.
    """
    layout = layout_for(bench.base, [*rows.gradient, *rows.selection, *rows.test])
    subject = Subject(bench.base.model, bench.targets, bench.spectra, OBJECTIVE, layout, bench.decompose)
    if fb_seconds is None:
        fb_seconds = measure_fb(bench.base.model, rows.gradient, layout)
    started = now()
    base = evaluate(bench.base.model, rows.test, OBJECTIVE, layout)
    return Cell(task, seed, bench, rows, subject, fb_seconds, base, now() - started)


def measure_fb(model: nn.Module, rows: Sequence[Encoded], layout: Layout) -> float:
    """Seconds of one forward and backward over the rows, with no hook on any target: gradients of the activations
    alone, as one pass of the method takes them. The first batch is run once before, unmeasured."""

    def forward_backward(batch: Batch) -> None:
        on_device = batch.to(next(model.parameters()).device)
        with torch.enable_grad():
            loss = losses(score(model, on_device), on_device, OBJECTIVE)
            loss.sum().backward()  # type: ignore[no-untyped-call]

    with frozen(model):
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        handle = embeddings.register_forward_hook(want_gradient)
        try:
            with Checkpointing(model) as within_memory:
                run = within_memory(forward_backward)
                # The longest rows come first: what memory does not hold is known before the clock runs.
                next(in_batches(rows, layout, "backward", run))
                started = now()
                for _ in in_batches(rows, layout, "backward", run):
                    pass
                return now() - started
        finally:
            handle.remove()

"""The side effect of an adaptation: how far next-token distributions move on text that is of no task (METHOD 2).

Drift is the mean, over the positions of `neutral.txt`, of the Kullback-Leibler divergence from the base model's
distribution of the next token to the adapted model's, in nats a token:

    drift = mean_t sum_v p_base(v | t) log(p_base(v | t) / p_adapted(v | t))

No plan touches the LM head, so what is kept of the base is the head's inputs, (tokens, hidden), and not its
log-probabilities, (tokens, vocabulary): beside an adapted model's inputs they go through the head once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib import resources

import torch
from torch import Tensor, nn

from workers.evaluation import answer_logits
from workers.examples import Batch, Encoded, Tokenizer, batches, special_prefix
from workers.ranking import Plan
from workers.subject import Subject

PARAGRAPH_TOKENS = 64
BATCH_TOKENS = 256
# Positions whose distributions are compared at once: a few tensors of (positions, vocabulary) beside the logits.
CHUNK = 64


def paragraphs() -> list[str]:
    """The neutral text: prose of many registers, code, tables, four languages; written for this package."""
    return resources.files("workers").joinpath("neutral.txt").read_text(encoding="utf-8").strip().split("\n\n")


def encode_neutral(texts: Sequence[str], tokenizer: Tokenizer, context: int | None) -> list[Encoded]:
    """Texts in tokens, special ones before them as before examples, cut to what the model can take.

    Each is an example whose answer is all of it but its first token: that is what is predicted.
    """
    longest = min(PARAGRAPH_TOKENS, context or PARAGRAPH_TOKENS)
    prefix = special_prefix(tokenizer)
    rows = [tuple([*prefix, *ids][:longest]) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return [
        Encoded(prompt=row[:1], continuations=(row[1:],), gold=0, labels=(text,))
        for row, text in zip(rows, texts, strict=True)
        if len(row) > 1
    ]


def divergence(base: Tensor, adapted: Tensor) -> Tensor:
    """KL divergence at each position, in nats.

    Args:
        base: (Q, vocabulary) logits.
        adapted: the same of the other model.

    Returns:
        (Q,) in float64, from log-probabilities in float32 (float64 for float64 logits): good to about 1e-6.
    """
    found = []
    for rows in zip(torch.split(base, CHUNK), torch.split(adapted, CHUNK), strict=True):
        log_p, log_q = ((x if x.dtype == torch.float64 else x.float()).log_softmax(-1) for x in rows)
        p = log_p.exp()
        # A token that the base rules out has no part in the sum, whatever its logarithms are.
        found.append(torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1, dtype=torch.float64))
    return torch.cat(found)


class NeutralText:
    """A text on which plans for one model are compared with the base. The base's forward pass is done once, when
    the first plan asks for it."""

    def __init__(self, subject: Subject, encoded: Sequence[Encoded], *, masked: bool = False) -> None:
        """
        Args:
            masked: whether the model is a masked language model. Of such a one each position's distribution over the
                unmasked text is compared, and rows are not padded, since it makes its own positions.
        """
        self._subject = subject
        # Small batches: two models' logits are held at once, and memory shall not end here where it did for no example.
        layout = subject.layout
        tokens, answers = min(layout.tokens, BATCH_TOKENS), max(1, layout.answers // 2)
        layout = replace(layout, tokens=tokens, answers=answers)
        device = next(subject.model.parameters()).device
        if masked:
            found = [replace(batch, position_ids=None) for one in encoded for batch in batches([one], layout)]
        else:
            found = list(batches(encoded, layout))
        self._batches = [batch.to(device) for batch in found]
        self.tokens = sum(batch.query_row.numel() for batch in self._batches)
        """Positions that the mean is over."""

    def drift(self, plan: Plan, subject: Subject | None = None) -> float:
        """Of the base without the plan's components, as `measure` gives it. The model must have its base weights,
        and has them again afterwards.

        Args:
            subject: the one that knows the row blocks that the plan touches, where that is another.
        """
        if not plan.size:
            return 0.0
        self.record()
        known = subject or self._subject
        with known.without(plan):
            return self.measure()

    def record(self) -> None:
        """Run the base, if that is not done yet: the model must have its base weights."""
        _ = self._head_inputs

    @torch.no_grad()
    def measure(self) -> float:
        """The drift of the model as it stands from the recorded base, in nats a token; infinite if its logits are
        not all numbers, NaN if it does not call its LM head as a module."""
        if len(self._head_inputs) < len(self._batches):
            return math.nan
        model = self._subject.model
        total = 0.0
        for batch, base_inputs in zip(self._batches, self._head_inputs, strict=True):
            with _head_sees(model, lambda own, base=base_inputs: torch.cat([own, base])):  # type: ignore[misc]
                adapted, base = answer_logits(model, _twice(batch)).chunk(2)
            total += float(divergence(base, adapted).sum())
        # Rounding may leave the sum a little below zero.
        return math.inf if math.isnan(total) else max(total / self.tokens, 0.0)

    @cached_property
    @torch.no_grad()
    def _head_inputs(self) -> list[Tensor]:
        """For each batch (R, T, hidden): what the base's LM head gets, padding too."""
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(hidden)
            return hidden

        with _head_sees(self._subject.model, keep):
            for batch in self._batches:
                one = replace(batch, query_row=batch.query_row[:1], query_position=batch.query_position[:1])
                answer_logits(self._subject.model, one)  # for its way to the head: one position's logits will do
        return kept


@contextmanager
def _head_sees(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The LM head's input (R, T, hidden) as `change` makes it, before `answer_logits` takes its positions of it."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _twice(batch: Batch) -> Batch:
    """The batch with each query a second time, in the rows that stand behind its own."""
    rows = len(batch.row_example)
    return replace(
        batch,
        query_row=torch.cat([batch.query_row, batch.query_row + rows]),
        query_position=batch.query_position.repeat(2),
    )

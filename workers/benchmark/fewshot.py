"""Few-shot prompting: examples of the gradient split before every prompt, their keys and values computed once.

The context is the same for all rows, so that a row costs what it costs alone, and attention over the context. Where
a model does not take a cache that way (a sliding window, a recurrence, a masked language model, whose tokens see what
follows), every row is run with the context in full.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from service.jobs import Example
from service.masks import fill
from workers.adaptation import layout_for
from workers.benchmark.cells import OBJECTIVE, Cell
from workers.benchmark.clock import now
from workers.evaluation import Outcome, evaluate, layout_tolerance, score
from workers.examples import Encoded, Layout, Tokenizer, batches, special_prefix

SHOTS = 8
SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class Prompted:
    """The base model behind a context, on the test split."""

    outcome: Outcome
    shots: int
    """Fewer than `SHOTS` where more do not fit."""
    cached: bool
    """Whether the context was run once."""
    seconds: float


def prompt_with_examples(cell: Cell, examples: Sequence[Example]) -> Prompted:
    """Evaluate the test split with examples of the gradient split in context.

    Args:
        examples: the gradient split.
    """
    started = now()
    base, rows = cell.bench.base, cell.rows.test
    special = special_prefix(base.tokenizer)
    shots, context = _fitting(
        balanced(examples, SHOTS, cell.seed), base.tokenizer, special, rows, cell.bench.model.context_length
    )
    behind = [_moved(row, row.prompt[len(special) :], -len(special)) for row in rows]
    joined = [_moved(row, (*context, *row.prompt), len(context)) for row in behind]
    prefixed = Prefixed.build(base.model, context) if context and not base.masked else None
    if prefixed is not None and agree(prefixed, behind, joined, cell.layout):
        outcome = evaluate(prefixed, behind, OBJECTIVE, cell.layout)
    else:
        prefixed = None
        outcome = evaluate(base.model, joined, OBJECTIVE, layout_for(base, joined))
    return Prompted(outcome, shots, prefixed is not None, now() - started)


def _moved(row: Encoded, prompt: tuple[int, ...], by: int) -> Encoded:
    """A row with another prompt, in which its mask stands so many tokens further on."""
    return replace(row, prompt=prompt, mask_at=None if row.mask_at is None else row.mask_at + by)


def balanced(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Some examples in random order, of each label as equally many as can be; of open tasks any."""
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for i in rng.permutation(len(examples)).tolist():
        example = examples[i]
        by_label.setdefault(example.completion if example.choices else "", []).append(i)
    rounds = max(map(len, by_label.values()))
    dealt = [rows[k] for k in range(rounds) for rows in by_label.values() if k < len(rows)][:count]
    return [examples[i] for i in rng.permutation(np.array(dealt)).tolist()]


def _fitting(
    examples: Sequence[Example], tokenizer: Tokenizer, special: list[int], rows: Sequence[Encoded], limit: int | None
) -> tuple[int, tuple[int, ...]]:
    """As many of the examples as leave room for the longest row, and their tokens, those before every text first."""
    longest = max(row.length for row in rows)
    for shots in range(len(examples), 0, -1):
        text = "".join(_answered(example, tokenizer) + SEPARATOR for example in examples[:shots])
        context = (*special, *tokenizer([text], add_special_tokens=False)["input_ids"][0])
        if limit is None or len(context) + longest <= limit:
            return shots, context
    return 0, tuple(special)


def _answered(example: Example, tokenizer: Tokenizer) -> str:
    """An example with its answer, behind the prompt or in the place of its mask."""
    mask = tokenizer.mask_token
    if mask is not None and mask in example.prompt:
        return fill(example.prompt, mask, example.completion)
    return example.prompt + example.completion


class _SharedContext(DynamicCache):
    """The context's keys and values, batch of one, put before every row's own; nothing is kept of the rows."""

    def __init__(self, filled: DynamicCache) -> None:
        super().__init__()
        self.layers = filled.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        R = key_states.shape[0]
        keys, values = (context.expand(R, -1, -1, -1) for context in (layer.keys, layer.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class Prefixed(nn.Module):
    """A causal language model that reads a context before every row."""

    def __init__(self, model: nn.Module, cache: DynamicCache, length: int) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.length = length

    @classmethod
    @torch.no_grad()
    def build(cls, model: nn.Module, context: Sequence[int]) -> Prefixed | None:
        """Run the context once; None where the model keeps it in another form than all its keys and values."""
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return None
        config: Any = model.config
        cache = DynamicCache(config=config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        tokens = torch.tensor([list(context)], device=next(model.parameters()).device)
        model(input_ids=tokens, use_cache=True, **{_cache_argument(model): cache})
        if cache.get_seq_length() != len(context):
            return None
        return cls(model, _SharedContext(cache), len(context))

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        return head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        """
        Args:
            input_ids: (R, T) of the rows alone.
            attention_mask: (R, T), 0 for padding, or (R, 1, T, T), added to the attention's scores.
            position_ids: (R, T), counted from the row's start.
        """
        ahead = (*attention_mask.shape[:-1], self.length)
        seen = attention_mask.new_ones(ahead) if attention_mask.ndim == 2 else attention_mask.new_zeros(ahead)
        return self.model(
            input_ids=input_ids,
            attention_mask=torch.cat([seen, attention_mask], dim=-1),
            position_ids=position_ids + self.length,
            use_cache=use_cache,
            **{_cache_argument(self.model): self.cache},
        )


def _cache_argument(model: nn.Module) -> str:
    """transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def agree(prefixed: Prefixed, behind: Sequence[Encoded], joined: Sequence[Encoded], layout: Layout) -> bool:
    """Whether the cached context gives what the joined prompt gives, tried on the longest row."""
    longest = max(range(len(behind)), key=lambda i: behind[i].length)
    device = next(prefixed.parameters()).device
    short, long = (
        score(model, next(batches([row], Layout(packed=packed))).to(device)).log_probabilities
        for model, row, packed in (
            (prefixed, behind[longest], layout.packed),
            (prefixed.model, joined[longest], False),
        )
    )
    return bool((short - long).abs().max() <= layout_tolerance(prefixed))

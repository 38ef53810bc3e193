"""References that share nothing with what they judge: one row at a time, no padding, no mask, no batch, no hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.jobs import Example, Objective, PromptFormat
from tests import tiny
from workers.examples import Encoded, encode
from workers.loading import Checkpoint, load
from workers.spectrum import Spectrum, decompose
from workers.targets import Target, find_targets

ARCHITECTURES = list(tiny.ARCHITECTURES)
MIXTURES = list(tiny.MIXTURES)

# Labels of one and of several tokens, two that share their first tokens, one that continues another; prompts of
# different lengths; open answers among closed ones.
LABELS = [" yes", " positive", " position", " no", " yes no"]
EXAMPLES = [
    Example(prompt="Is this good? Answer:", completion=" positive", choices=LABELS),
    Example(prompt="City: Lyon. Country:", completion=" France"),
    Example(prompt="red green blue red green blue red", completion=" yes no", choices=LABELS[::-1]),
    Example(prompt="Which", completion=" city", choices=[" city", " sentence"]),
    Example(prompt="The capital of France", completion=" is Paris."),
    Example(prompt="Answer:", completion=" positive", choices=[" position", " positive", " yes no"]),
]


@lru_cache(maxsize=64)
def loaded(folder: Path) -> Checkpoint:
    """A model in memory, shared by all tests of the process: who changes it puts it back."""
    checkpoint = load(folder)
    if checkpoint.dtype == torch.float64:
        # Experts are fused into a product that torch has in no double precision; one by one they are the same.
        model: Any = checkpoint.model
        model.set_experts_implementation("eager")
    return checkpoint


@lru_cache(maxsize=64)
def targets_of(folder: Path) -> tuple[list[Target], dict[str, Spectrum]]:
    """The model's targets and their components."""
    targets, _ = find_targets(loaded(folder).model)
    return targets, {target.name: decompose(target.weight) for target in targets}


def encoded(folder: Path, examples: Sequence[Example] = EXAMPLES) -> list[Encoded]:
    """The examples in the model's tokens."""
    return encode(examples, loaded(folder).tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")


def row_length(example: Encoded) -> int:
    """Tokens of the example's row in the packed layout, at most."""
    return len(example.prompt) + sum(map(len, example.continuations))


def window(folder: Path) -> int:
    """How many tokens back the model sees in some layer."""
    config: Any = loaded(folder).model.config
    return int(getattr(config, "sliding_window", None) or getattr(config, "window_size", None) or tiny.CONTEXT)


def within_window(folder: Path, examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples that a model with a sliding window can take in packed rows."""
    return [example for example in examples if row_length(example) <= window(folder)]


def log_probability(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """The total log-probability of a continuation, by a forward pass over nothing else."""
    tokens = torch.tensor([[*prompt, *continuation]])
    logits = model(input_ids=tokens, use_cache=False).logits[0]
    predictions = logits[len(prompt) - 1 : -1].log_softmax(-1)
    chosen: Tensor = predictions[torch.arange(len(continuation)), torch.tensor(continuation)]
    return chosen.sum()


def loss(model: Any, example: Encoded, objective: Objective) -> Tensor:
    """An example's loss as METHOD 2 writes it."""
    totals = torch.stack([log_probability(model, example.prompt, c) for c in example.continuations])
    likelihood = -totals[example.gold]
    if len(totals) == 1 or objective is Objective.COMPLETION:
        return likelihood
    choice = -totals.log_softmax(0)[example.gold]
    return choice if objective is Objective.CHOICE else choice + likelihood


def greedy(model: Any, prompt: Sequence[int], n: int) -> list[int]:
    """The first n tokens that transformers itself generates."""
    tokens = torch.tensor([list(prompt)])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=None,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@contextmanager
def nudged(weight: Tensor, change: Tensor) -> Iterator[None]:
    """The weight with something added, for the length of the context."""
    original = weight.clone()
    weight.add_(change)
    try:
        yield
    finally:
        weight.copy_(original)


@contextmanager
def double_throughout() -> Iterator[None]:
    """Float64 where transformers says float32: norms, rotations and softmaxes of a float64 model are otherwise
    rounded to seven digits, of which a finite difference leaves three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}

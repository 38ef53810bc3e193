"""Test examples that the adapted model answers otherwise than the base, for people to read.

Which are shown is no choice of the most telling: of those gained and of those lost as many are taken, evenly over the
test split. Only these are decoded: what is right and wrong is known from the evaluation (`evaluation.score`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from service.reports import ChangedExample
from workers.batching import in_batches
from workers.evaluation import Outcome, answer_logits
from workers.examples import Batch, Encoded, Tokenizer
from workers.ranking import Plan
from workers.subject import Subject

SHOWN = 10
# Greedy decoding goes this many tokens beyond the length of the right answer, and no further than the second.
MORE_TOKENS = 8
MOST_TOKENS = 64
# Longest texts that a report holds.
PROMPT_CHARACTERS = 1200
ANSWER_CHARACTERS = 300
MOST_CHOICES = 20


def changed_examples(
    subject: Subject,
    tokenizer: Tokenizer,
    examples: Sequence[Encoded],
    plans: Sequence[Plan],
    base: Outcome,
    adapted: Outcome,
) -> list[ChangedExample]:
    """At most ten examples with other answers.

    Args:
        plans: for each example the plan that `adapted` is of.
        base, adapted: on these examples.
    """
    picked = _pick(examples, base, adapted)
    shown = [examples[i] for i in picked]
    before = _answers(subject, tokenizer, shown, [Plan()] * len(picked), [int(base.predicted[i]) for i in picked])
    after = _answers(subject, tokenizer, shown, [plans[i] for i in picked], [int(adapted.predicted[i]) for i in picked])
    found = []
    for i, example, old, new in zip(picked, shown, before, after, strict=True):
        correct = bool(base.right[i]), bool(adapted.right[i])
        if any(correct) or old != new:
            choices = [_cut(label, ANSWER_CHARACTERS) for label in example.labels] if example.closed else None
            found.append(
                ChangedExample(
                    prompt=_cut(example.text, PROMPT_CHARACTERS),
                    completion=_cut(example.labels[example.gold], ANSWER_CHARACTERS),
                    choices=choices if choices and len(choices) <= MOST_CHOICES else None,
                    base_answer=_cut(old, ANSWER_CHARACTERS),
                    adapted_answer=_cut(new, ANSWER_CHARACTERS),
                    base_correct=correct[0],
                    adapted_correct=correct[1],
                )
            )
    return found


def _pick(examples: Sequence[Encoded], base: Outcome, adapted: Outcome) -> list[int]:
    """Gained ones first, then lost ones, half of each where there are enough, then others: a choice that changed
    from wrong to wrong, and open ones whose loss changed most, which may have kept their answer."""
    gained = [int(i) for i in np.flatnonzero((adapted.right == 1) & (base.right == 0))]
    lost = [int(i) for i in np.flatnonzero((base.right == 1) & (adapted.right == 0))]
    wrong = (base.right == 0) & (adapted.right == 0)
    closed = np.array([example.closed for example in examples], dtype=bool)
    other = [int(i) for i in np.flatnonzero(wrong & closed & (base.predicted != adapted.predicted))]
    by_change = np.argsort(-np.abs(adapted.loss - base.loss), kind="stable")
    other += [int(i) for i in by_change if wrong[i] and not closed[i]]
    some_lost = min(len(lost), max(SHOWN // 2, SHOWN - len(gained)))
    some_gained = min(len(gained), SHOWN - some_lost)
    rest = SHOWN - some_gained - some_lost
    return [*_evenly(gained, some_gained), *_evenly(lost, some_lost), *other[:rest]]


def _evenly(items: Sequence[int], count: int) -> list[int]:
    return [items[k * len(items) // count] for k in range(count)]


def _answers(
    subject: Subject, tokenizer: Tokenizer, examples: Sequence[Encoded], plans: Sequence[Plan], predicted: Sequence[int]
) -> list[str]:
    """What the model without each example's plan answers to it: its choice, or a text."""
    answers = [example.labels[k] for example, k in zip(examples, predicted, strict=True)]
    for plan in _different(plans):
        rows = [i for i, own in enumerate(plans) if own is plan and not examples[i].closed]
        if not rows:
            continue
        with subject.without(plan):
            for i, tokens in zip(rows, decode_greedily(subject, [examples[i] for i in rows]), strict=True):
                answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def _different(plans: Iterable[Plan]) -> list[Plan]:
    return list({id(plan): plan for plan in plans}.values())


@torch.no_grad()
def decode_greedily(subject: Subject, examples: Sequence[Encoded]) -> list[list[int]]:
    """The tokens that follow each prompt, some more than the right answer has; with masks, the likeliest at each."""
    if examples[0].mask_at is not None:
        return _fill_masks(subject, examples)
    model: Any = subject.model
    most = min(MOST_TOKENS, MORE_TOKENS + max(len(e.continuations[e.gold]) for e in examples))
    # A row is the prompt alone: nothing is predicted from an answer's last token, and these have but one.
    prompts = [Encoded(e.prompt, (e.continuations[e.gold][:1],), 0, ("",)) for e in examples]
    own = model.generation_config
    # A model's own settings, a penalty for repetition say, would answer otherwise than what exact match is about.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=most, pad_token_id=0, eos_token_id=own.eos_token_id
    )

    def run(batch: Batch) -> Tensor:
        on_device = batch.to(next(model.parameters()).device)
        tokens: Tensor = model.generate(on_device.input_ids, attention_mask=on_device.visible.long())
        return tokens[:, on_device.input_ids.shape[1] :].cpu()

    found: list[list[int]] = [[] for _ in examples]
    try:
        for batch, tokens in in_batches(prompts, subject.layout, "forward", run):
            for i, row in zip(batch.examples, tokens.tolist(), strict=True):
                found[i] = _until(row, own.eos_token_id)
    finally:
        model.generation_config = own
    return found


def _until(tokens: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """The tokens before the first that ends a text: behind it a row of a batch is padded."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return tokens[: next((k for k, token in enumerate(tokens) if token in stops), len(tokens))]


def _fill_masks(subject: Subject, examples: Sequence[Encoded]) -> list[list[int]]:
    device = next(subject.model.parameters()).device

    def run(batch: Batch) -> Tensor:
        on_device = batch.to(device)
        likeliest = answer_logits(subject.model, on_device).argmax(-1)
        return torch.stack([on_device.token_continuation, likeliest[on_device.token_query]]).cpu()

    found: list[list[int]] = [[] for _ in examples]
    for batch, pairs in in_batches(examples, subject.layout, "forward", run):
        for continuation, token in pairs.T.tolist():
            found[batch.examples[continuation]].append(token)
    return found


def _cut(text: str, most: int) -> str:
    """The text, or its beginning and its end."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]} … {text[-half:]}"

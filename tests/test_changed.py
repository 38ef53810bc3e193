"""The examples that a report shows: which ones, and what each model answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.jobs import Example, Objective
from service.reports import ChangedExample
from tests import plain
from tests.plain import encoded, loaded, targets_of
from tests.planted import Planted
from workers.changed import changed_examples, decode_greedily
from workers.evaluation import Outcome, answer_logits, evaluate
from workers.examples import Encoded, Layout, batches
from workers.pruning import applied
from workers.ranking import Plan
from workers.subject import Subject

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]


def subject_of(folder: Path) -> Subject:
    targets, spectra = targets_of(folder)
    return Subject(loaded(folder).model, targets, spectra, Objective.BOTH, Layout(packed=True))


def outcome(right: Sequence[int], predicted: Sequence[int]) -> Outcome:
    """Closed examples, right or wrong."""
    hits = np.array(right, dtype=float)
    return Outcome(np.ones(len(hits)), hits, np.array(predicted), hits)


def closed(n: int) -> list[Encoded]:
    labels = ("a", "b", "c")
    return [Encoded((1,), ((2,), (3,), (4,)), 0, labels, text=f"prompt {i}") for i in range(n)]


def numbers(found: Sequence[ChangedExample]) -> list[int]:
    return [int(example.prompt.removeprefix("prompt ")) for example in found]


@pytest.mark.parametrize(
    ("gained", "lost", "other", "shown"),
    [
        (20, 20, 5, (5, 5, 0)),
        (20, 2, 5, (8, 2, 0)),
        (2, 20, 5, (2, 8, 0)),
        (3, 1, 20, (3, 1, 6)),
        (0, 0, 3, (0, 0, 3)),
        (0, 0, 0, (0, 0, 0)),
    ],
)
def test_ten_are_shown_of_both_kinds_and_then_of_those_that_are_wrong_otherwise(
    gained: int, lost: int, other: int, shown: tuple[int, int, int], tiny_models: TinyModels
) -> None:
    subject = subject_of(tiny_models("llama"))
    kinds = [*[(0, 1)] * gained, *[(1, 0)] * lost, *[(1, 1), (0, 0)] * 4]
    base = outcome([b for b, _ in kinds] + [0] * other, [1 - b for b, _ in kinds] + [1] * other)
    adapted = outcome([a for _, a in kinds] + [0] * other, [1 - a for _, a in kinds] + [2] * other)
    examples = closed(len(kinds) + other)
    found = changed_examples(
        subject, loaded(tiny_models("llama")).tokenizer, examples, [Plan()] * len(examples), base, adapted
    )
    pairs = [(example.base_correct, example.adapted_correct) for example in found]
    assert tuple(map(pairs.count, [(False, True), (True, False), (False, False)])) == shown
    if gained == 20 and lost == 20:
        assert numbers(found) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]  # evenly over the split
    for example in found:
        assert example.choices == ["a", "b", "c"]
        assert example.base_answer == ("a" if example.base_correct else "b")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt_neo", "mistral", "mixtral"])
def test_an_open_answer_is_what_the_model_says_to_that_prompt_alone(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    prompts = ["Which", "The capital of France is the city", "red green blue"]
    examples = encoded(folder, [Example(prompt=text, completion=" yes no") for text in prompts])
    found = decode_greedily(subject_of(folder), examples)
    model: Any = loaded(folder).model
    ends = model.config.eos_token_id
    length = 8 + len(examples[0].continuations[0])
    for example, tokens in zip(examples, found, strict=True):
        alone = plain.greedy(model, example.prompt, length)
        expected = alone[: alone.index(ends)] if ends in alone else alone
        assert tokens == expected


def test_a_models_own_settings_for_generation_play_no_part_and_are_kept(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    examples = encoded(folder, [Example(prompt="red green red green", completion=" yes")])
    expected = decode_greedily(subject_of(folder), examples)
    model: Any = loaded(folder).model
    settings = model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.min_new_tokens = 5.0, True, 3
    try:
        assert decode_greedily(subject_of(folder), examples) == expected
        assert model.generation_config is settings
    finally:
        settings.repetition_penalty, settings.do_sample, settings.min_new_tokens = None, None, None


@pytest.mark.parametrize("architecture", ["roberta", "bert"])
def test_a_masked_models_answer_is_the_likeliest_at_each_mask(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    mask = loaded(folder).tokenizer.mask_token
    texts = [f"red {mask} green", f"the capital {mask}"]
    examples = encoded_masked(folder, [Example(prompt=text, completion=" yes no yes") for text in texts])
    for example, tokens in zip(examples, decode_greedily(subject_of(folder), examples), strict=True):
        (batch,) = batches([example], Layout(packed=False))
        with torch.no_grad():
            likeliest = answer_logits(loaded(folder).model, batch).argmax(-1)
        assert tokens == likeliest.tolist()
        assert len(tokens) == len(example.continuations[0])


def encoded_masked(folder: Path, examples: list[Example]) -> list[Encoded]:
    from service.jobs import PromptFormat
    from workers.masked import encode

    return encode(examples, loaded(folder).tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")


def test_each_example_is_answered_under_its_own_plan(planted: Planted) -> None:
    subject = subject_of(planted.folder)
    tokenizer = loaded(planted.folder).tokenizer
    cured, spoilt = Plan({planted.module: (0,)}), Plan()
    examples = encoded(
        planted.folder, [Example(prompt=e.prompt, completion=e.completion) for e in planted.examples[:40]]
    )
    base = evaluate(subject.model, examples, Objective.BOTH, subject.layout)
    with applied(subject.targets, subject.spectra, cured):
        adapted = evaluate(subject.model, examples, Objective.BOTH, subject.layout)
    found = changed_examples(subject, tokenizer, examples, [cured] * 40, base, adapted)
    assert found
    for example in found:
        assert example.choices is None
        assert example.adapted_correct == example.adapted_answer.startswith(example.completion)
        assert example.base_correct == example.base_answer.startswith(example.completion)
    kept = changed_examples(subject, tokenizer, examples, [spoilt] * 40, base, adapted)
    assert all(example.base_answer == example.adapted_answer for example in kept)


def test_long_texts_are_cut_and_many_choices_left_out(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    labels = tuple("x" * 400 + str(k) for k in range(30))
    example = Encoded((1,), tuple((k,) for k in range(30)), 0, labels, text="begin " + "y" * 5000 + " end")
    (found,) = changed_examples(
        subject_of(folder), loaded(folder).tokenizer, [example], [Plan()], outcome([0], [1]), outcome([1], [0])
    )
    assert found.choices is None
    assert len(found.prompt) <= 1200
    assert found.prompt.startswith("begin y")
    assert found.prompt.endswith("y end")
    assert len(found.adapted_answer) <= 300

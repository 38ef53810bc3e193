"""Losses, exact match and layouts against plain transformers; what is reported of them against worked examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from service.jobs import Example, Objective
from tests import plain
from tests.plain import ARCHITECTURES, encoded, loaded, within_window
from workers.evaluation import (
    Array,
    Outcome,
    answer_logits,
    differences,
    evaluate,
    honours_tree_mask,
    metrics,
    paired_p,
    score,
)
from workers.examples import Encoded, Layout, batches

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]
PACKED, FLAT = Layout(packed=True), Layout(packed=False)


def table(folder: Path, examples: Sequence[Encoded], layout: Layout) -> list[list[float]]:
    """For each example the log-probabilities of its continuations, by the product's batches."""
    found: list[list[float]] = [[] for _ in examples]
    with torch.no_grad():
        for batch in batches(examples, layout):
            scored = score(loaded(folder).model, batch).log_probabilities
            for e, i in enumerate(batch.examples):
                found[i] = scored[e, : len(examples[i].continuations)].tolist()
                assert all(math.isinf(rest) for rest in scored[e, len(examples[i].continuations) :].tolist())
    return found


def plain_table(folder: Path, examples: Sequence[Encoded]) -> list[list[float]]:
    """The same by one unpadded row each."""
    model = loaded(folder).model
    with torch.no_grad():
        return [[float(plain.log_probability(model, e.prompt, c)) for c in e.continuations] for e in examples]


@pytest.mark.parametrize("layout", [PACKED, FLAT, Layout(packed=True, tokens=1)], ids=["packed", "flat", "single"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_choice_has_the_log_probability_it_has_alone(
    architecture: str, layout: Layout, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    examples = encoded(folder)
    if layout.packed:
        examples = within_window(folder, examples)
        assert len(examples) >= 4
        assert honours_tree_mask(loaded(folder).model, examples)
    for found, expected in zip(table(folder, examples, layout), plain_table(folder, examples), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


WINDOWED = ["gemma2", "gemma3", "mistral", "gpt_neo"]
LONG = Example(prompt="red green blue " * 8 + "Answer:", completion=" positive", choices=[" positive", " yes no"])


@pytest.mark.parametrize("architecture", WINDOWED)
def test_rows_longer_than_a_sliding_window_are_laid_out_flat_and_are_then_right(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    examples = encoded(folder, [LONG])
    assert len(examples[0].prompt) > plain.window(folder)
    assert not honours_tree_mask(loaded(folder).model, examples)
    expected = plain_table(folder, examples)[0]
    assert table(folder, examples, FLAT)[0] == pytest.approx(expected, abs=2e-5)
    # The window is real: packed, the same rows would be wrong.
    assert table(folder, examples, PACKED)[0] != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_one_row_over_the_window_makes_all_rows_flat(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    short = within_window(folder, encoded(folder))
    assert honours_tree_mask(loaded(folder).model, short)
    assert max(len(e.continuations) for e in short) > 2  # so the long one is not the one with the most branches
    assert not honours_tree_mask(loaded(folder).model, [*short, *encoded(folder, [LONG])])


def test_a_window_of_zero_is_none(tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen2_moe")
    model = loaded(folder).model
    config: Any = model.config
    assert config.sliding_window == 0
    assert honours_tree_mask(model, encoded(folder))
    examples = encoded(folder)
    for found, expected in zip(table(folder, examples, PACKED), plain_table(folder, examples), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_says_whether_transformers_own_greedy_generation_gives_the_completion(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    model = loaded(folder).model
    examples: list[Encoded] = []
    truth: list[float] = []
    for example in encoded(folder):
        generated = tuple(plain.greedy(model, example.prompt, 3))
        wrong_first = ((generated[0] + 1) % 300, *generated[1:])
        wrong_last = (*generated[:2], (generated[2] + 1) % 300)
        for continuation, right in ((generated, 1), (generated[:1], 1), (wrong_first, 0), (wrong_last, 0)):
            examples.append(Encoded(example.prompt, (continuation,), 0, ("it",)))
            truth.append(right)
        # Among choices it is the gold one that counts, wherever it stands and whatever it shares with others.
        examples.append(Encoded(example.prompt, (wrong_last, generated, wrong_first), 1, ("a", "b", "c")))
        examples.append(Encoded(example.prompt, (wrong_last, generated, wrong_first), 0, ("a", "b", "c")))
        truth += [1, 0]
    for layout in (PACKED, FLAT) if honours_tree_mask(model, examples) else (FLAT,):
        assert evaluate(model, examples, Objective.BOTH, layout).exact.tolist() == truth


@pytest.mark.parametrize("layout", [PACKED, FLAT], ids=["packed", "flat"])
@pytest.mark.parametrize("objective", list(Objective))
def test_the_loss_is_that_of_the_method(objective: Objective, layout: Layout, tiny_models: TinyModels) -> None:
    folder = tiny_models("qwen2", "float64")
    model, examples = loaded(folder).model, encoded(folder)
    with torch.no_grad():
        expected = [float(plain.loss(model, example, objective)) for example in examples]
    outcome = evaluate(model, examples, objective, layout)
    assert outcome.loss.tolist() == pytest.approx(expected, abs=1e-5)
    totals = plain_table(folder, examples)
    assert outcome.predicted.tolist() == [int(np.argmax(t)) for t in totals]
    hits = [
        float("nan") if not e.closed else float(np.argmax(t) == e.gold) for e, t in zip(examples, totals, strict=True)
    ]
    np.testing.assert_array_equal(outcome.correct, hits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_what_else_is_in_a_batch_changes_no_result(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    model, examples = loaded(folder).model, encoded(folder)
    alone = np.concatenate([evaluate(model, [e], Objective.BOTH, PACKED).loss for e in examples])
    for order in (range(6), reversed(range(6)), [3, 0, 5, 1, 4, 2]):
        rows = list(order)
        for layout in (PACKED, FLAT, Layout(packed=True, tokens=60), Layout(packed=False, answers=9)):
            together = evaluate(model, [examples[i] for i in rows], Objective.BOTH, layout)
            assert together.loss.tolist() == pytest.approx(alone[rows].tolist(), abs=2e-5)


def test_the_head_is_applied_to_queries_only_and_its_hook_is_gone_after_an_error(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    model = loaded(folder).model
    batch = next(batches(encoded(folder), PACKED))
    with torch.no_grad():
        logits = answer_logits(model, batch)
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    assert logits.shape == (len(batch.query_row), head.get_parameter("weight").shape[0])
    bad = batch.to(torch.device("cpu"))
    bad.input_ids[0, 0] = 10**6
    with pytest.raises(IndexError):
        answer_logits(model, bad)
    assert not head._forward_pre_hooks


def test_sixteen_bit_models_are_scored_in_single_precision(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama", "bfloat16")
    with torch.no_grad():
        scored = score(loaded(folder).model, next(batches(encoded(folder), PACKED)))
    assert scored.log_probabilities.dtype == torch.float32
    assert honours_tree_mask(loaded(folder).model, encoded(folder))


def test_an_empty_split_has_an_empty_outcome(tiny_models: TinyModels) -> None:
    assert evaluate(loaded(tiny_models("llama")).model, [], Objective.BOTH, PACKED).loss.shape == (0,)


# --- what is reported -------------------------------------------------------------------------------------------


def closed(gold: int) -> Encoded:
    return Encoded((1,), ((2,), (3,), (4,)), gold, ("a", "b", "c"))


def outcome(loss: Sequence[float], exact: Sequence[int], predicted: Sequence[int], correct: Sequence[float]) -> Outcome:
    return Outcome(np.array(loss, float), np.array(exact, float), np.array(predicted), np.array(correct, float))


def test_metrics_show_a_collapse_to_one_label() -> None:
    examples = [closed(0), closed(0), closed(0), closed(1), Encoded((1,), ((2,),), 0, ("open",))]
    found = metrics(outcome([1, 2, 3, 4, 5], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, math.nan]), examples)
    assert found.n == 5
    assert found.accuracy == 0.75  # of the four with choices
    assert found.balanced_accuracy == 0.5  # 3 of 3 a, 0 of 1 b
    assert found.majority_rate == 0.6  # over all five golds
    assert found.exact_match == 0.4
    assert found.loss == 3
    assert found.confusion == {"a": {"a": 3}, "b": {"a": 1}}


def test_open_answers_alone_have_no_accuracy() -> None:
    examples = [Encoded((1,), ((2,),), 0, ("x",)), Encoded((2,), ((2,),), 0, ("y",))]
    found = metrics(outcome([1, 2], [1, 0], [0, 0], [math.nan, math.nan]), examples)
    assert found.accuracy is None
    assert found.balanced_accuracy is None
    assert found.confusion is None
    kinds = [d.metric for d in differences(outcome([1, 2], [1, 0], [0, 0], [math.nan] * 2), found_twice(), seed=0)]
    assert kinds == ["exact_match", "loss"]


def found_twice() -> Outcome:
    return outcome([1, 3], [1, 1], [0, 0], [math.nan, math.nan])


def test_the_difference_is_paired_with_mcnemars_p_and_a_bootstrap_interval() -> None:
    rng = np.random.default_rng(5)
    N = 200
    base: Array = (rng.random(N) < 0.4).astype(float)
    adapted = base.copy()
    gained = np.flatnonzero(base == 0)[:30]
    lost = np.flatnonzero(base == 1)[:10]
    adapted[gained], adapted[lost] = 1, 0
    before = rng.normal(3, 1, N)
    after = before - rng.normal(0.5, 1, N)
    found = differences(
        Outcome(before, base, np.zeros(N, np.int64), base),
        Outcome(after, adapted, np.zeros(N, np.int64), adapted),
        seed=0,
    )
    assert [d.metric for d in found] == ["accuracy", "exact_match", "loss"]
    accuracy, _, loss = found
    assert accuracy.value == pytest.approx(0.1)
    # Exact McNemar: 30 of 40 discordant pairs, a fair coin's two tails.
    tail = sum(math.comb(40, k) for k in range(30, 41)) / 2**40
    assert accuracy.p == pytest.approx(2 * tail)
    # The interval of a mean of +1, 0 and -1: normal theory is near at 200.
    error = 1.96 * np.std(adapted - base) / N**0.5
    assert (accuracy.low, accuracy.high) == pytest.approx((0.1 - error, 0.1 + error), abs=0.01)
    assert loss.value == pytest.approx(float((after - before).mean()))
    assert loss.p == pytest.approx(stats.ttest_rel(after, before).pvalue)
    assert loss.low < loss.value < loss.high < 0
    again = differences(
        Outcome(before, base, np.zeros(N, np.int64), base),
        Outcome(after, adapted, np.zeros(N, np.int64), adapted),
        seed=0,
    )
    assert again == found


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    same = outcome([1, 2, 3], [1, 0, 1], [0, 1, 2], [1, 0, 1])
    for difference in differences(same, same, seed=0):
        assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_one_example_proves_nothing() -> None:
    assert paired_p(np.array([-5.0]), two_sided=False) == 1
    assert paired_p(np.array([-5.0]), two_sided=True) == 1
    assert paired_p(np.array([]), two_sided=False) == 1


def test_a_paired_p_is_small_only_for_a_reliable_fall() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 100)
    assert paired_p(noise - 1, two_sided=False) < 1e-6
    assert paired_p(noise + 1, two_sided=False) > 0.99
    assert 0.05 < paired_p(noise, two_sided=False) < 0.95
    assert paired_p(np.zeros(10), two_sided=False) == 1
    assert paired_p(noise - 1, two_sided=True) == pytest.approx(2 * paired_p(noise - 1, two_sided=False))

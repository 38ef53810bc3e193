"""Drift is the divergence it says it is, on every architecture, and no accepted plan exceeds the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.errors import InvalidInput
from service.jobs import JobSpec, Objective
from service.strategies import LaserOptions
from tests import tiny
from tests.plain import ARCHITECTURES, MIXTURES, encoded, loaded, targets_of, weights_of
from tests.planted import Planted
from tests.test_examples import sentencepiece
from tests.test_pruning import same_bits
from workers.bounds import DriftBound
from workers.drift import CHUNK, PARAGRAPH_TOKENS, NeutralText, divergence, encode_neutral, paragraphs
from workers.examples import Encoded, Layout
from workers.proposals import Proposal
from workers.pruning import pruned
from workers.ranking import Plan
from workers.search import Search
from workers.splits import divide
from workers.strategies import make_search
from workers.subject import Subject, Track

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]
TEXTS = [
    "The capital of France is Paris.",
    "red green",
    "Answer: yes no yes, one longer line of words for a window",
    "def f(x): return x",
]


def subject(folder: Path, layout: Layout | None = None) -> Subject:
    targets, spectra = targets_of(folder)
    return Subject(loaded(folder).model, targets, spectra, Objective.BOTH, layout or Layout(packed=True))


def neutral(folder: Path, layout: Layout | None = None, texts: Sequence[str] = TEXTS) -> NeutralText:
    return NeutralText(subject(folder, layout), encode_neutral(texts, loaded(folder).tokenizer, tiny.CONTEXT))


def largest(folder: Path, count: int) -> Plan:
    """The plan without the first few components of every second module."""
    targets, _ = targets_of(folder)
    return Plan({target.name: tuple(range(count)) for target in targets[::2]})


def log_distributions(model: Any, texts: Sequence[Encoded]) -> Tensor:
    """(positions, vocabulary) in float64, one text at a time."""
    rows = [torch.tensor([[*text.prompt, *text.continuations[0]]]) for text in texts]
    with torch.no_grad():
        logits = [model(input_ids=row, use_cache=False).logits[0, :-1] for row in rows]
    return torch.cat(logits).double().log_softmax(-1)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_drift_is_the_divergence_between_full_softmaxes_of_single_rows(
    tiny_models: TinyModels, architecture: str
) -> None:
    folder = tiny_models(architecture)
    model, (targets, spectra) = loaded(folder).model, targets_of(folder)
    texts = encode_neutral(TEXTS, loaded(folder).tokenizer, tiny.CONTEXT)
    plan = largest(folder, 2)
    before = weights_of(model)
    found = neutral(folder).drift(plan)
    assert same_bits(weights_of(model), before)

    base = log_distributions(model, texts)
    originals = {target.name: target.weight.clone() for target in targets}
    for target in targets:
        if target.name in plan.components:
            target.weight.copy_(pruned(target.weight, spectra[target.name], plan.components[target.name]))
    try:
        adapted = log_distributions(model, texts)
    finally:
        for target in targets:
            target.weight.copy_(originals[target.name])
    expected = (base.exp() * (base - adapted)).sum(-1)
    assert neutral(folder).tokens == len(expected) > CHUNK
    assert found == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found > 1e-3


def test_nothing_removed_is_no_drift(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    assert neutral(folder).drift(Plan()) == 0.0
    # Components that are zero: the weights stay what they are, and the distributions are compared.
    name = targets_of(folder)[0][0].name
    whole = subject(folder)
    nought = replace(whole.spectra[name], basis=torch.zeros_like(whole.spectra[name].basis))
    unchanged = replace(whole, spectra={**whole.spectra, name: nought})
    text = NeutralText(unchanged, encode_neutral(TEXTS, loaded(folder).tokenizer, None))
    assert text.drift(Plan({name: (0, 1)})) == pytest.approx(0.0, abs=1e-9)


def test_drift_grows_with_what_is_removed(tiny_models: TinyModels) -> None:
    text = neutral(tiny_models("qwen2"))
    found = [text.drift(largest(tiny_models("qwen2"), count)) for count in (0, 1, 4, 16)]
    assert found == sorted(found)
    assert found[1] > 1e-3


def test_drift_does_not_depend_on_the_layout_and_no_more_logits_are_held_than_it_allows(
    tiny_models: TinyModels,
) -> None:
    folder = tiny_models("gemma2")
    plan = largest(folder, 2)
    head: Any = loaded(folder).model.get_output_embeddings()  # type: ignore[operator]
    drifts = []
    for tokens, answers in ((4096, 4096), (64, 4096), (4096, 100), (4096, 1)):
        text = neutral(folder, Layout(packed=True, tokens=tokens, answers=answers))
        held: list[int] = []
        handle = head.register_forward_hook(lambda _, inputs, out, held=held: held.append(out.shape[:-1].numel()))
        drifts.append(text.drift(plan))
        handle.remove()
        longest = max(len(e.continuations[0]) for e in encode_neutral(TEXTS, loaded(folder).tokenizer, None))
        assert max(held) <= max(answers, 2 * longest)
    assert drifts == pytest.approx([drifts[0]] * 4, rel=1e-4)


def test_the_base_is_run_once(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    runs: list[int] = []
    handle = loaded(folder).model.register_forward_hook(lambda *_: runs.append(1))
    text = neutral(folder)
    text.drift(Plan())
    assert not runs  # nothing is computed before it is asked for
    first = text.drift(largest(folder, 1))
    both = len(runs)  # a batch of the base and of the model without the plan each
    assert text.drift(largest(folder, 1)) == first
    assert len(runs) == both + both // 2
    handle.remove()


def test_the_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    known = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    # Any logits will do that differ by the logarithms; what the base rules out has no part.
    assert float(divergence(p.log() + 3, q.log() - 1)) == pytest.approx(known, rel=1e-6)
    assert float(divergence(q.log(), q.log())) == 0.0
    assert float(divergence(p.bfloat16().log(), q.bfloat16().log())) == pytest.approx(known, rel=0.01)


def test_logits_that_are_no_numbers_are_an_infinite_drift(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    whole = subject(folder)
    name = targets_of(folder)[0][0].name
    broken = replace(whole.spectra[name], basis=whole.spectra[name].basis * math.nan)
    text = NeutralText(
        replace(whole, spectra={name: broken}), encode_neutral(TEXTS, loaded(folder).tokenizer, tiny.CONTEXT)
    )
    assert text.drift(Plan({name: (0,)})) == math.inf


# --- the text ---------------------------------------------------------------------------------------------------


def test_the_text_is_of_many_paragraphs_cut_to_what_a_model_can_take(tiny_models: TinyModels) -> None:
    texts = paragraphs()
    assert len(texts) > 15
    assert all(text == text.strip() and text for text in texts)
    tokenizer = loaded(tiny_models("llama")).tokenizer
    for context, longest in ((None, PARAGRAPH_TOKENS), (tiny.CONTEXT, PARAGRAPH_TOKENS), (20, 20)):
        lengths = [e.length for e in encode_neutral(texts, tokenizer, context)]
        assert len(lengths) == len(texts)
        assert max(lengths) == longest


def test_a_text_begins_with_the_special_tokens_that_the_model_knows() -> None:
    tokenizer = sentencepiece()
    (one,) = encode_neutral(["red green"], tokenizer, None)
    assert one.prompt == (tokenizer.bos_token_id,)
    assert list(one.continuations[0]) == tokenizer(["red green"], add_special_tokens=False)["input_ids"][0]


# --- the bound --------------------------------------------------------------------------------------------------


def of_size(n: int) -> Proposal:
    return Proposal(f"{n} components", n, None, lambda track: Plan({"w": tuple(range(n))}))


@pytest.mark.parametrize(
    ("most", "expected", "refused"),
    [
        (1000, [16, 32, 64, 128], []),
        (128, [16, 32, 64, 128], []),
        (100, [16, 32, 64, 96], [128, 112]),
        (115, [16, 32, 64, 112], [128]),
        (65, [16, 32, 64], [128, 96, 80]),
        (15, [12], [16]),
        (3, [2], [16, 8, 4]),
        (1, [1], [16, 8, 4, 2]),
        (0.5, [], [16, 8, 4, 2, 1]),
    ],
)
def test_the_sizes_under_a_bound_use_it_well(most: float, expected: list[int], refused: list[int]) -> None:
    measured: list[int] = []

    def drift(plan: Plan) -> float:
        measured.append(plan.size)
        return float(plan.size)

    over: list[Proposal] = []
    grid = [of_size(n) for n in (16, 32, 64, 128)]
    allowed = DriftBound(drift, most).within(grid, of_size, lambda proposal: proposal.addition(0), over)
    assert not measured
    first = next(allowed, None)
    if most >= 16:
        assert measured == [16]  # none is measured before it is asked for
    assert [proposal.size for proposal in (*([first] if first else []), *allowed)] == expected
    assert [proposal.size for proposal in over] == refused
    assert len(measured) == len(set(measured))


def test_an_empty_grid_has_no_sizes() -> None:
    assert list(DriftBound(lambda plan: 0.0, 1.0).within([], of_size, lambda p: p.addition(0), [])) == []


def test_a_drift_that_is_no_number_is_allowed_by_no_bound() -> None:
    assert not DriftBound(lambda plan: math.nan, 1e9).allows(Plan())


def bounded(
    planted: Planted, most: float | None, passes: int = 1, few: int | None = None
) -> tuple[Search, NeutralText]:
    """A search on the planted model; on a few examples, if told so, cross-fitted."""
    pool = encoded(planted.folder, planted.examples[:few])
    text = neutral(planted.folder, texts=paragraphs()[:4])
    bound = None if most is None else DriftBound(text.drift, most)
    if few is None:
        track = Track(list(range(60)), list(range(60, 120)))
        found = Search(subject(planted.folder), pool, [track], track, bound=bound)
    else:
        splits = divide(pool, None, None, seed=3)
        found = Search(subject(planted.folder), splits.pool, splits.tracks, splits.result, bound=bound)
    found.run(passes, lambda stage, number, fraction, message: None)
    return found, text


def test_a_drift_that_falls_with_size_binds_too(planted: Planted) -> None:
    pool = encoded(planted.folder, planted.examples)
    track = Track(list(range(60)), list(range(60, 120)))
    begins: list[int] = []

    def drift(plan: Plan) -> float:
        """Under the bound from where a climb begins on, over it for all that is smaller."""
        if plan.size > 1 and not begins:
            begins.append(plan.size)
        return 0.0 if begins and plan.size >= begins[0] else 2.0

    search = Search(subject(planted.folder), pool, [track], track, bound=DriftBound(drift, 1.0))
    search.run(1, lambda stage, number, fraction, message: None)
    tried = {candidate.size for candidate in search.passes[0].candidates}
    assert begins and min(tried) == begins[0]
    # Without a bound it goes on to smaller ones.
    free = Search(subject(planted.folder), pool, [Track(track.fit, track.judge)], track)
    free.run(1, lambda stage, number, fraction, message: None)
    assert any(1 < candidate.size < begins[0] for candidate in free.passes[0].candidates)


@pytest.mark.parametrize("few", [None, 40], ids=["split", "cross-fitted"])
def test_no_accepted_plan_exceeds_the_bound_and_it_still_gains(planted: Planted, few: int | None) -> None:
    free, text = bounded(planted, None, passes=3, few=few)
    drifts = [text.drift(plan) for plan in free.plans]
    most = 0.6 * drifts[-1]
    assert most > 0
    held, text = bounded(planted, most, passes=3, few=few)
    assert 0 < text.drift(held.result.plan) <= most
    assert all(text.drift(plan) <= most for plan in held.plans)
    assert held.result.plan.size < free.result.plan.size
    assert held.outcomes[-1].loss.mean() < 0.9 * held.outcomes[0].loss.mean()
    assert "over max_drift" in "".join(report.reason for report in held.passes)
    assert "max_drift" not in "".join(report.reason for report in free.passes)


def test_a_bound_under_the_smallest_grid_size_leaves_room_for_a_smaller_plan(planted: Planted) -> None:
    free, text = bounded(planted, None)
    held, _ = bounded(planted, 0.2 * text.drift(free.plans[1]))
    (report,) = held.passes
    assert report.accepted
    assert 0 < report.chosen < 16
    assert held.outcomes[1].loss.mean() < 0.9 * held.outcomes[0].loss.mean()


def test_a_bound_that_allows_nothing_is_told_to_be_the_reason(planted: Planted) -> None:
    held, _ = bounded(planted, 1e-6, passes=3)
    (report,) = held.passes
    assert (report.accepted, report.candidates, held.result.plan) == (False, [], Plan())
    assert report.reason == "the least that could be removed would take the drift over max_drift"


def test_of_a_grid_the_number_that_a_bound_has_refused_is_told(planted: Planted) -> None:
    pool = encoded(planted.folder, planted.examples)
    for refused, told in (("mlp", "; 6 of 14 candidates would"), ("layers", "14 of 14 candidates would")):
        track = Track(list(range(60)), list(range(60, 120)))
        options = LaserOptions(retentions=(0.5,))
        search = make_search(subject(planted.folder), pool, [track], track, options, 0)
        search.jury.bound = DriftBound(lambda plan, part=refused: float(part in "".join(plan.components)), 0.5)  # type: ignore[misc]
        search.run(1, lambda stage, number, fraction, message: None)
        (report,) = search.passes
        assert told in report.reason
        assert report.reason.endswith("take the drift over max_drift")


def test_a_bound_that_is_never_reached_changes_nothing(planted: Planted) -> None:
    free, _ = bounded(planted, None, passes=2)
    held, _ = bounded(planted, 1e9, passes=2)
    assert held.plans == free.plans
    assert [p.reason for p in held.passes] == [p.reason for p in free.passes]
    for one, two in zip(free.outcomes, held.outcomes, strict=True):
        assert one.loss.tobytes() == two.loss.tobytes()


@pytest.mark.parametrize("value", [0, 0.0, -0.1, math.nan, math.inf, "0.1", True, [0.1]])
def test_what_is_no_bound_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        JobSpec.parse({"model": "m", "examples": tiny.learnable_examples(12), "max_drift": value})
    assert refused.value.param == "max_drift"


def test_a_bound_is_a_number_above_zero_or_none() -> None:
    job = {"model": "m", "examples": tiny.learnable_examples(12)}
    assert JobSpec.parse(job).max_drift is None
    assert JobSpec.parse(job | {"max_drift": None}).max_drift is None
    assert JobSpec.parse(job | {"max_drift": 1}).max_drift == 1.0

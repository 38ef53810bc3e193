"""Masked language models: what stands at a mask, what is refused, and a whole adaptation of tiny ones.

The reference takes one unpadded row at a time, without an attention mask, batch or hook.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, FillMaskPipeline

from service import models
from service.errors import InvalidInput, UnusableModel
from service.jobs import Example, JobSpec, Objective, PromptFormat
from service.lengths import check_lengths
from service.masks import check_masks
from tests import plain, tiny
from tests.plain import loaded, nudged, targets_of
from tests.test_adaptation import Run, check
from workers.evaluation import evaluate, honours_tree_mask, score
from workers.examples import Encoded, Layout, batches
from workers.gradients import effects
from workers.loading import load
from workers.masked import encode
from workers.targets import find_targets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TinyModels = Callable[..., Path]
MASKED = list(tiny.MASKED)
MAIN = ["roberta", "bert", "distilbert"]
FLAT = Layout(packed=False)
LABELS = [" yes", " positive", " no", " yes no", " Paris and Lyon"]


def mask_of(folder: Path) -> str:
    mask = loaded(folder).tokenizer.mask_token
    assert mask is not None
    return mask


def examples(mask: str) -> list[Example]:
    """Masks at the beginning, inside and at the end; answers of one and of several tokens; open ones among closed."""
    return [
        Example(prompt=f"Is this sentence good? Answer: {mask}.", completion=" positive", choices=LABELS),
        Example(prompt=f"City: Lyon. Country:{mask}", completion=" France"),
        Example(prompt=f"red green blue {mask} green blue red", completion=" yes no", choices=LABELS[::-1]),
        Example(prompt=f"{mask} is the capital of France.", completion="Paris", choices=["Paris", "Lyon"]),
        Example(prompt=f"The capital of France {mask}", completion=" is Paris."),
    ]


def encoded(folder: Path, chosen: Sequence[Example] | None = None) -> list[Encoded]:
    tokenizer = loaded(folder).tokenizer
    chosen = examples(mask_of(folder)) if chosen is None else chosen
    return encode(chosen, tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")


def answer_logits(model: Any, example: Encoded, answer: Sequence[int]) -> Tensor:
    """(len(answer), vocabulary): by a forward pass over the example's row alone."""
    assert example.mask_at is not None
    at = example.mask_at
    row = list(example.prompt[:at]) + [example.prompt[at]] * len(answer) + list(example.prompt[at + 1 :])
    found: Tensor = model(input_ids=torch.tensor([row])).logits[0, at : at + len(answer)]
    return found


def log_probability(model: Any, example: Encoded, answer: Sequence[int]) -> Tensor:
    """The sum over the answer's positions, all of them masked."""
    predictions = answer_logits(model, example, answer).log_softmax(-1)
    total: Tensor = predictions[torch.arange(len(answer)), torch.tensor(answer)].sum()
    return total


def plain_loss(model: Any, example: Encoded) -> Tensor:
    """METHOD 2's sum of both terms."""
    totals = torch.stack([log_probability(model, example, answer) for answer in example.continuations])
    choice = -totals.log_softmax(0)[example.gold] if example.closed else 0
    return choice - totals[example.gold]


# --- what stands at the mask ------------------------------------------------------------------------------------


def unigram() -> Any:
    """A tokenizer as XLM-R's, whose mask swallows the blank before it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        ".",
        "(",
        "Paris",
        "▁The",
        "▁capital",
        "▁is",
        "▁Paris",
        "▁yes",
        "▁no",
    ]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", mask_token=mask)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bpe": tiny.masked_bpe,
    "wordpiece": tiny.wordpiece,
    "unigram": unigram,
}


@pytest.mark.parametrize(
    ("kind", "prompt", "completion", "tokens"),
    [
        ("bpe", "The capital of France is<mask>.", " Paris", ["ĠParis"]),
        ("bpe", "The capital of France is <mask>.", "Paris", ["ĠParis"]),
        ("bpe", "The capital of France is <mask>.", " Paris", ["ĠParis"]),
        ("bpe", "The capital of France is <mask>", " Paris", ["ĠParis"]),
        ("bpe", "The capital of France is <mask> .", "Paris", ["ĠParis"]),
        ("bpe", "(<mask>) yes", "yes", ["yes"]),
        ("bpe", "good <mask> red", "yes no", ["Ġyes", "Ġno"]),
        ("bpe", "Answer:\n<mask>", "yes", ["Ċ", "yes"]),
        ("bpe", "good<mask>negative", " yes", ["Ġyes"]),  # "yesnegative" is cut elsewhere
        ("wordpiece", "The capital of France is [MASK].", "paris", ["paris"]),
        ("wordpiece", "The capital of France is [MASK].", " Paris", ["paris"]),
        ("wordpiece", "The capital of France is[MASK].", " paris", ["paris"]),
        ("wordpiece", "[MASK] is good", "yes no", ["yes", "no"]),
        ("wordpiece", "[MASK]ly is good", "yes", ["yes"]),
        ("unigram", "The capital is <mask>.", "Paris", ["▁Paris"]),
        ("unigram", "The capital is<mask>.", " Paris", ["▁Paris"]),
        ("unigram", "The capital is <mask>", " Paris", ["▁Paris"]),
        ("unigram", "The capital (<mask>", "Paris", ["Paris"]),
        ("unigram", "The <mask> is", "yes no", ["▁yes", "▁no"]),
    ],
)
def test_the_answers_tokens_are_those_that_the_tokenizer_gives_it_in_its_place(
    kind: str, prompt: str, completion: str, tokens: list[str]
) -> None:
    tokenizer = TOKENIZERS[kind]()
    example = Example(prompt=prompt, completion=completion)
    (found,) = encode([example], tokenizer, prompt_format=PromptFormat.TEXT, context=None, name="examples")
    assert tokenizer.convert_ids_to_tokens(list(found.continuations[0])) == tokens
    assert list(found.prompt) == tokenizer(prompt)["input_ids"]  # special tokens on both sides
    assert found.mask_at is not None
    assert found.prompt[found.mask_at] == tokenizer.mask_token_id
    assert found.length == len(found.prompt) - 1 + len(tokens)


def test_answers_of_equally_many_tokens_share_a_row_and_each_other_length_has_its_own(tiny_models: TinyModels) -> None:
    folder = tiny_models("roberta")
    closed, opened = encoded(folder)[:2]
    counts = {len(answer) for answer in closed.continuations}
    assert 1 < len(counts) < len(closed.continuations)
    (batch,) = batches([closed, opened], FLAT)
    mask = loaded(folder).tokenizer.mask_token_id
    rows = batch.row_example.tolist()
    of_closed = [batch.input_ids[r].tolist().count(mask) for r, e in enumerate(rows) if batch.examples[e] == 0]
    assert sorted(of_closed) == sorted(counts)
    assert len(rows) == len(of_closed) + 1
    assert len(batch.query_row) == sum(counts) + len(opened.continuations[0])
    assert not honours_tree_mask(loaded(folder).model, [closed, opened])


def test_batches_of_masked_examples_keep_their_budgets(tiny_models: TinyModels) -> None:
    folder = tiny_models("bert")
    pool = encoded(folder) * 8
    seen: list[int] = []
    for batch in batches(pool, Layout(packed=False, tokens=150, answers=20)):
        seen += batch.examples
        assert batch.input_ids.numel() <= 150
        assert len(batch.query_row) <= 20
    assert sorted(seen) == list(range(len(pool)))
    assert len(list(batches(pool, Layout(packed=False, tokens=150, answers=20)))) < len(pool)


# --- scores and effects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [FLAT, Layout(packed=False, tokens=1)], ids=["together", "alone"])
@pytest.mark.parametrize("architecture", MASKED)
@torch.no_grad()
def test_every_answer_has_the_log_probability_that_it_has_alone(
    architecture: str, layout: Layout, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    model, pool = loaded(folder).model, encoded(folder)
    for batch in batches(pool, layout):
        table = score(model, batch).log_probabilities
        for e, i in enumerate(batch.examples):
            expected = [float(log_probability(model, pool[i], answer)) for answer in pool[i].continuations]
            assert table[e, : len(expected)].tolist() == pytest.approx(expected, abs=5e-5)
    outcome = evaluate(model, pool, Objective.BOTH, layout)
    assert outcome.loss.tolist() == pytest.approx([float(plain_loss(model, e)) for e in pool], abs=1e-4)


@pytest.mark.parametrize("architecture", MAIN)
@torch.no_grad()
def test_one_mask_is_scored_as_transformers_own_pipeline_scores_it(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    model: Any = loaded(folder).model
    tokenizer: Any = loaded(folder).tokenizer
    prompt = f"Is this sentence good? Answer: {mask_of(folder)}."
    pool = encoded(folder, [Example(prompt=prompt, completion=" yes", choices=[" yes", " no"])])
    assert [len(answer) for answer in pool[0].continuations] == [1, 1]
    found = score(model, next(batches(pool, FLAT))).log_probabilities[0].exp().tolist()
    told = FillMaskPipeline(model, tokenizer)(prompt, top_k=model.config.vocab_size)
    by_token = {one["token"]: one["score"] for one in told}
    assert found == pytest.approx([by_token[answer[0]] for answer in pool[0].continuations], rel=1e-4)


@pytest.mark.parametrize("architecture", MAIN)
@torch.no_grad()
def test_exact_says_whether_the_arg_max_at_every_mask_is_the_completions_token(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    model = loaded(folder).model
    pool: list[Encoded] = []
    truth: list[float] = []
    for one in encoded(folder):
        best = tuple(answer_logits(model, one, (0, 0)).argmax(-1).tolist())
        first_wrong, last_wrong = ((best[0] + 1) % 300, best[1]), (best[0], (best[1] + 1) % 300)
        for answer, right in ((best, 1), (first_wrong, 0), (last_wrong, 0)):
            pool.append(Encoded(one.prompt, (answer,), 0, ("it",), one.mask_at))
            truth.append(right)
        pool.append(Encoded(one.prompt, (last_wrong, best), 1, ("a", "b"), one.mask_at))
        truth.append(1)
    assert evaluate(model, pool, Objective.BOTH, FLAT).exact.tolist() == truth


@pytest.fixture
def double() -> Iterator[None]:
    """For the length of a test, float64 models compute in float64 throughout."""
    with plain.double_throughout():
        yield


def found_effects(folder: Path, layout: Layout = FLAT) -> dict[str, Tensor]:
    targets, spectra = targets_of(folder)
    found, unreached = effects(loaded(folder).model, targets, spectra, encoded(folder), Objective.BOTH, layout)
    shared_with_distances = {t.name for t in targets if t.name.endswith((".query_proj", ".key_proj"))}
    assert set(unreached) == shared_with_distances
    return found.by_module


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("architecture", MAIN)
def test_an_effect_is_the_slope_of_each_examples_loss_along_its_singular_value(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    found = found_effects(folder)
    model, pool = loaded(folder).model, encoded(folder)
    step = 1e-4
    for target in targets_of(folder)[0]:
        U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
        for i in (0, len(S) // 2):
            losses = []
            for sign in (1, -1):
                with nudged(target.weight, sign * step * torch.outer(U[:, i], Vh[i])), torch.no_grad():
                    losses.append(torch.stack([plain_loss(model, example) for example in pool]))
            slope = S[i] * (losses[0] - losses[1]) / (2 * step)
            a = found[target.name]
            torch.testing.assert_close(a[:, i], slope, rtol=1e-3, atol=1e-6 * float(a.abs().max()))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("architecture", MASKED)
def test_effects_are_the_diagonal_of_the_dense_gradients_of_unbatched_examples(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, "float64")
    found = found_effects(folder)
    model = loaded(folder).model
    targets = [target for target in targets_of(folder)[0] if target.name in found]
    parameters = [target.module.get_parameter("weight") for target in targets]
    for n, example in enumerate(encoded(folder)):
        gradients = torch.autograd.grad(plain_loss(model, example), parameters)
        for target, G in zip(targets, gradients, strict=True):
            U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
            dense = S * torch.diagonal(U.T @ G @ Vh.T)
            torch.testing.assert_close(found[target.name][n], dense, rtol=1e-6, atol=1e-8 * float(dense.abs().max()))


def test_effects_that_cannot_be_attributed_are_left_out_with_one_row_a_batch_too(tiny_models: TinyModels) -> None:
    folder = tiny_models("deberta")
    alone, together = found_effects(folder, Layout(packed=False, tokens=1)), found_effects(folder)
    assert alone
    for name, a in alone.items():
        torch.testing.assert_close(a, together[name], rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("architecture", MAIN)
def test_the_matrices_of_the_encoder_are_targets_and_those_of_the_head_are_not(
    architecture: str, tiny_models: TinyModels
) -> None:
    model = loaded(tiny_models(architecture)).model
    targets, skipped = find_targets(model)
    assert not skipped
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    outside = {name for name in matrices if any(part in name for part in ("embeddings", "lm_head", "cls.", "vocab_"))}
    assert any("dense" in name or "transform" in name for name in outside)
    assert {f"{target.name}.weight" for target in targets} == matrices - outside
    assert len(targets) == 6 * tiny.LAYERS


# --- the whole way ----------------------------------------------------------------------------------------------


def learnable(mask: str, count: int = 120) -> list[dict[str, Any]]:
    """A closed task whose answers have one and two tokens."""
    labels = [" yes", " no", " yes no"]
    rows = range(count)
    return [{"prompt": f"Item {i}: answer {mask}.", "completion": labels[i % 3], "choices": labels} for i in rows]


@pytest.mark.parametrize("architecture", MAIN)
def test_an_adaptation_is_read_back_by_stock_peft_and_transformers_and_scores_what_its_report_says(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models(architecture)
    rows = learnable(mask_of(folder))
    run = Run(folder, tmp_path / "out", tmp_path / "cache", examples=rows[:80], test=rows[80:], passes=2)
    report = check(run)
    assert report.improved
    assert report.adapted.loss < report.base.loss
    assert report.model.architecture.endswith("ForMaskedLM")
    assert report.model.target_modules == 6 * tiny.LAYERS
    config = json.loads((run.out / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None
    merged: Any = AutoModelForMaskedLM.from_pretrained(run.out / "model").eval()
    stock: Any = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with_adapter = peft.PeftModel.from_pretrained(stock, run.out / "adapter").eval()
    test = encoded(folder, [Example(**row) for row in rows[80:]])
    for model in (merged, with_adapter):
        with torch.no_grad():
            losses = [float(plain_loss(model, example)) for example in test]
            totals = [[float(log_probability(model, e, answer)) for answer in e.continuations] for e in test]
            exact = [
                answer_logits(model, e, e.continuations[e.gold]).argmax(-1).tolist() == list(e.continuations[e.gold])
                for e in test
            ]
        assert sum(losses) / 40 == pytest.approx(report.adapted.loss, abs=1e-4)
        assert sum(max(t) == t[e.gold] for t, e in zip(totals, test, strict=True)) / 40 == report.adapted.accuracy
        assert sum(exact) / 40 == report.adapted.exact_match


# --- refusals ---------------------------------------------------------------------------------------------------


def spoilt(mask: str, **change: Any) -> list[dict[str, Any]]:
    rows = learnable(mask, 12)
    rows[3] |= change
    return rows


REFUSALS: dict[str, tuple[Callable[[str], dict[str, Any]], str, str]] = {
    "no mask": (lambda m: {"prompt": "Item 3: answer"}, "examples[3].prompt", "0 times"),
    "another's mask": (lambda m: {"prompt": "Item <MASK> [mask]"}, "examples[3].prompt", "0 times"),
    "two masks": (lambda m: {"prompt": f"Item {m} and {m}"}, "examples[3].prompt", "2 times"),
    "a mask as choice": (lambda m: {"choices": [" yes", " no", f" {m}"]}, "examples[3].choices[2]", "no answer"),
    "a mask as completion": (
        lambda m: {"completion": f" {m}", "choices": None},
        "examples[3].completion",
        "no answer",
    ),
}


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize("architecture", MAIN)
def test_api_and_worker_refuse_in_the_same_words_what_has_no_place_for_its_answer(
    architecture: str, refused: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny_models(architecture)
    mask = mask_of(folder)
    change, param, words = REFUSALS[refused]
    spec = JobSpec.parse({"model": folder.name, "examples": spoilt(mask, **change(mask))})
    model = models.resolve(folder.parent, folder.name)
    assert (model.masked, model.mask_token) == (True, mask)
    with pytest.raises(InvalidInput, match=words) as in_api:
        check_masks(model, spec)
    with pytest.raises(InvalidInput) as in_worker:
        encoded(folder, spec.examples)
    with pytest.raises(InvalidInput) as before_loading:
        Run(folder, tmp_path, tmp_path, examples=spoilt(mask, **change(mask)))
    assert in_api.value.body() == in_worker.value.body() == before_loading.value.body()
    assert in_api.value.param == param
    assert mask in in_api.value.message


def test_a_chat_with_a_masked_language_model_is_refused(tiny_models: TinyModels) -> None:
    folder = tiny_models("bert")
    spec = JobSpec.parse({"model": folder.name, "examples": learnable("[MASK]", 12), "prompt_format": "chat"})
    with pytest.raises(InvalidInput) as caught:
        check_masks(models.resolve(folder.parent, folder.name), spec)
    assert caught.value.param == "prompt_format"
    with pytest.raises(InvalidInput):
        encode(spec.examples, loaded(folder).tokenizer, prompt_format=PromptFormat.CHAT, context=None, name="examples")


def test_choices_of_the_same_tokens_and_answers_of_none_are_refused(tiny_models: TinyModels) -> None:
    folder = tiny_models("bert")
    prompt = "Answer: [MASK]."
    fine = Example(prompt=prompt, completion="yes", choices=["yes", "no"])
    with pytest.raises(InvalidInput) as same:
        encoded(folder, [fine, Example(prompt=prompt, completion="yes", choices=["yes", " YES"])])
    assert same.value.param == "examples[1].choices"
    with pytest.raises(InvalidInput) as empty:
        encoded(folder, [Example(prompt=prompt, completion="\u0001")])
    assert empty.value.param == "examples[0].completion"


def test_to_a_causal_model_a_mask_is_text(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    model = models.resolve(folder.parent, folder.name)
    assert (model.masked, model.mask_token) == (False, None)
    check_masks(model, JobSpec.parse({"model": folder.name, "examples": spoilt("<mask>", prompt="none [MASK][MASK]")}))
    (found,) = plain.encoded(folder, [Example(prompt="Item <mask> [MASK]:", completion=" yes")])
    assert loaded(folder).tokenizer.decode(found.prompt, skip_special_tokens=False) == "Item <mask> [MASK]:"
    assert found.mask_at is None


@pytest.mark.parametrize("architecture", MAIN)
def test_the_longest_example_that_both_checks_let_pass_is_one_that_the_model_takes(
    architecture: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    mask = mask_of(folder)
    model = models.resolve(folder.parent, folder.name)
    assert model.context_length == tiny.CONTEXT  # RoBERTa's config says two more

    def longest(repeats: int) -> JobSpec:
        return JobSpec.parse({"model": folder.name, "examples": spoilt(mask, prompt="red " * repeats + f"{mask}.")})

    def worker(spec: JobSpec) -> list[Encoded]:
        tokenizer = loaded(folder).tokenizer
        context = model.context_length
        return encode(spec.examples, tokenizer, prompt_format=PromptFormat.TEXT, context=context, name="examples")

    fits = next(n for n in range(200, 300) if encoded(folder, longest(n).examples)[3].length == tiny.CONTEXT)
    check_lengths(model, longest(fits))
    outcome = evaluate(loaded(folder).model, [worker(longest(fits))[3]], Objective.BOTH, FLAT)
    assert outcome.loss[0] > 0
    with pytest.raises(InvalidInput) as in_api:
        check_lengths(model, longest(fits + 1))
    with pytest.raises(InvalidInput) as in_worker:
        worker(longest(fits + 1))
    assert in_api.value.body() == in_worker.value.body()
    assert in_api.value.param == "examples[3].prompt"


@pytest.mark.parametrize(("architecture", "mask"), [("roberta", "<mask>"), ("bert", "[MASK]")])
def test_the_mask_token_is_found_where_only_the_vocabularys_file_has_it(
    architecture: str, mask: str, tmp_path: Path
) -> None:
    # RoBERTa's own tokenizer_config.json says nothing of it.
    folder = tiny.build(architecture, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in told.items() if key != "mask_token"}))
    assert models.resolve(tmp_path, "model").mask_token == mask
    path.write_text(json.dumps(told | {"mask_token": {"content": "<here>", "lstrip": True}}))
    assert models.resolve(tmp_path, "model").mask_token == "<here>"
    path.write_text("{}")
    (folder / "tokenizer.json").unlink()
    model = models.resolve(tmp_path, "model")
    assert (model.masked, model.mask_token) == (True, None)
    check_masks(model, JobSpec.parse({"model": "model", "examples": spoilt("", prompt="left to the worker")}))


def test_a_masked_language_model_without_a_mask_token_or_an_attention_mask_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tiny.build("bert", tmp_path / "bert")
    tiny.tokenizer().save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).mask_token is None
    with pytest.raises(UnusableModel, match="no mask token"):
        load(folder)
    from transformers import FNetConfig, FNetForMaskedLM

    FNetForMaskedLM(FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16)).save_pretrained(
        tmp_path / "fnet"
    )
    with pytest.raises(UnusableModel, match="no attention mask"):
        load(tmp_path / "fnet")

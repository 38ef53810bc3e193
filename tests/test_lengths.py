"""The length check: as the tokenizer counts, and its shortcut never lets a long example pass."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from service import lengths
from service.errors import InvalidInput, UnusableModel
from service.jobs import JobSpec
from service.lengths import check_lengths, check_total
from service.models import Model, resolve
from tests import tiny
from tests.live import install, spec


@pytest.fixture
def model(data: Path) -> Model:
    return resolve(data / "models", "tiny-llama")


def with_prompt(prompt: str, **changes: Any) -> JobSpec:
    examples = tiny.learnable_examples(12)
    examples[3]["prompt"] = prompt
    return JobSpec.parse(spec(examples=examples, **changes))


@pytest.mark.parametrize("text", ["x", "é", "日", "yes ", "🙂", "\n"])
def test_the_limit_is_where_the_tokenizer_says(model: Model, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))

    def tokens(repeats: int) -> int:
        texts = [f"?{text * repeats}?{answer}" for answer in tiny.learnable_examples(1)[0]["choices"]]
        return max(len(tokenizer.encode(one).ids) for one in texts)

    fits = next(n for n in range(10, 5000) if tokens(n + 1) > tiny.CONTEXT)
    check_lengths(model, with_prompt(f"?{text * fits}?"))
    with pytest.raises(InvalidInput) as caught:
        check_lengths(model, with_prompt(f"?{text * (fits + 1)}?"))
    assert caught.value.param == "examples[3].prompt"
    assert f"{tokens(fits + 1)} tokens" in caught.value.message


def _normalizer(model: Model, normalizer: object) -> Model:
    path = model.folder / "tokenizer.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"normalizer": normalizer}))
    return model


def test_a_normalizer_that_lengthens_its_text_is_reckoned_with(model: Model) -> None:
    # Under NFKC one character of three bytes becomes eighteen of 33.
    prompt = "?" + "\ufdfa" * 12
    check_lengths(model, with_prompt(prompt))
    _normalizer(model, {"type": "NFKC"})
    with pytest.raises(InvalidInput):
        check_lengths(model, with_prompt(prompt))


def test_a_normalizer_that_is_not_known_leaves_no_shortcut(model: Model) -> None:
    grow = {"type": "Replace", "pattern": {"String": "x"}, "content": "y" * 300}
    _normalizer(model, {"type": "Sequence", "normalizers": [grow, {"type": "Precompiled"}]})
    status = (model.folder / "tokenizer.json").stat()
    key = (model.folder / "tokenizer.json", status.st_size, status.st_mtime_ns)
    assert lengths._growth(*key) is None


def test_what_was_said_before_a_prompt_counts(model: Model) -> None:
    turns = [{"role": "system", "content": "x7" * 300}]
    examples = [one | {"turns": turns} for one in tiny.learnable_examples(12)]
    long = JobSpec.parse(spec(examples=examples, prompt_format="chat"))
    with pytest.raises(InvalidInput, match="context"):
        check_lengths(model, long)
    with pytest.raises(InvalidInput, match="tokens or more together"):
        check_total(model, long, 2_000)
    check_total(model, with_prompt("x", prompt_format="chat"), 2_000)


def test_a_replacement_that_lengthens_its_text_is_reckoned_with(model: Model) -> None:
    _normalizer(model, {"type": "Replace", "pattern": {"String": "x"}, "content": "日" * 300})
    with pytest.raises(InvalidInput):
        check_lengths(model, with_prompt("x"))


def test_a_model_that_says_no_limit_or_has_no_tokenizer_file_is_left_to_the_worker(model: Model) -> None:
    long = with_prompt("x7" * 5000)
    check_lengths(replace(model, context_length=None), long)
    (model.folder / "tokenizer.json").unlink()
    check_lengths(model, long)


def test_a_broken_tokenizer_is_said_to_be_the_models_fault(model: Model) -> None:
    (model.folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UnusableModel):
        check_lengths(model, with_prompt("x" * 300))


def test_a_tokenizer_that_changes_is_read_again(model: Model, data: Path, tiny_models: Callable[..., Path]) -> None:
    check_lengths(model, with_prompt("x"))
    again = install(tiny_models("llama"), data, "other")
    assert resolve(data / "models", "other").revision == model.revision
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10}))
    changed = resolve(data / "models", "other")
    assert changed.revision != model.revision
    with pytest.raises(InvalidInput):
        check_lengths(changed, with_prompt("a longer prompt than ten tokens"))


def test_ten_thousand_long_examples_are_counted_in_seconds(model: Model) -> None:
    examples = [{"prompt": f"{i} " + "word " * 60, "completion": " yes"} for i in range(10_000)]
    parsed = JobSpec.parse(spec(examples=examples))
    began = time.perf_counter()
    check_lengths(replace(model, context_length=350), parsed)
    assert time.perf_counter() - began < 10

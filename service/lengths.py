"""Whether examples fit into a model's context, counted before any work by the light `tokenizers` package.

Most examples are so short that no token count is needed: a tokenizer that does not lengthen its text makes at most
one token of each byte. Only the others are tokenised.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from service.errors import InvalidInput
from service.jobs import Example, JobSpec, PromptFormat
from service.masks import fill
from service.model_files import unusable
from service.models import Model, too_long
from service.tokenizer_files import head, working_tokenizer

# Special tokens that a post-processor may add, and a blank that a pre-tokenizer may prepend.
MARGIN_TOKENS = 64
# By how much a normalizer can lengthen a text in UTF-8, at worst: U+FDFA is 3 bytes and 33 under NFKC. One that is
# not listed may do anything, and every example is then tokenised.
GROWTH = {"Prepend": 1, "Strip": 1, "StripAccents": 1, "NFC": 4, "NFD": 4, "NFKC": 11, "NFKD": 11, "Lowercase": 2}
# By how much replacements may do that, one after the other: those in use replace a character by one.
MAX_REPLACED = 1000
# A blank becomes U+2581, of three bytes, and as many tokens where the vocabulary lacks it.
METASPACE_GROWTH = 3
# A fraction of a second's counting.
PIECE_CHARACTERS = 250_000
# The largest body takes a few seconds; a pattern can be made to try for a third of a second at each text.
COUNT_SECONDS = 60.0
BATCH = 256
# Of English in a vocabulary of today.
BYTES_A_TOKEN = 4


def check_lengths(model: Model, spec: JobSpec) -> None:
    """Refuse the first example that is longer than the model's context.

    Where the model has no `tokenizer.json` nothing is known here and the worker checks. In a chat the template's
    tokens come on top: the worker, which can render it, counts again.

    Raises:
        InvalidInput: naming the example, its tokens and the limit.
    """
    path = model.folder / "tokenizer.json"
    limit = model.context_length
    if limit is None or not path.is_file():
        return
    status = path.stat()
    key = (path, status.st_size, status.st_mtime_ns)
    growth = _growth(*key)
    long = [
        (at, example)
        for at, example in spec.located()
        if growth is None or growth * _bytes(example) + MARGIN_TOKENS > limit
    ]
    if not long:
        return
    tokenizer = _tokenizer(*key)
    # Each distinct answer once: closed tasks have the same few choices everywhere.
    answers = list(dict.fromkeys(answer for _, example in long for answer in _answers(example)))
    lengths = dict(zip(answers, _count(tokenizer, answers), strict=True))
    # Prompt and answer together, as the worker does: a token may span their border.
    longest = [(_prompt(example), max(_answers(example), key=lambda answer: lengths[answer])) for _, example in long]
    if model.mask_token is not None:
        whole = [fill(prompt, model.mask_token, answer) for prompt, answer in longest]
        special = tokenizer.num_special_tokens_to_add(False)
    else:
        whole = [prompt + answer for prompt, answer in longest]
        special = _special_prefix(tokenizer) if spec.prompt_format is PromptFormat.TEXT else 0
    for (at, _), tokens in zip(long, _count(tokenizer, whole), strict=True):
        if special + tokens > limit:
            raise too_long(at, special + tokens, limit)


def check_prompt(model: Model, prompt: str, answer: int) -> None:
    """Refuse a prompt that leaves no room for so many tokens behind it; a chat template's are not counted.

    Raises:
        InvalidInput: with the prompt's tokens and the room that there is.
    """
    path = model.folder / "tokenizer.json"
    limit = model.context_length
    if limit is None or not path.is_file():
        return
    status = path.stat()
    key = (path, status.st_size, status.st_mtime_ns)
    growth = _growth(*key)
    if growth is None or growth * len(prompt.encode()) + MARGIN_TOKENS > limit - answer:
        check_room(_count(_tokenizer(*key), [prompt])[0], answer, limit)


def check_room(prompt: int, answer: int, limit: int | None) -> None:
    """Refuse a prompt of so many tokens that leaves no room for `answer` more in a context of `limit`."""
    if limit is not None and prompt + answer > limit:
        raise InvalidInput(
            f"{prompt:,} tokens, and {answer} of an answer; the model's context is {limit:,}",
            param="prompt" if answer < limit else "max_tokens",
        )


def check_total(model: Model, spec: JobSpec, limit: int) -> None:
    """Refuse a job of more than `limit` tokens, prompts and all answers of its lists together.

    It counts no further than it must: a stranger's job of millions costs no more than one that is taken.

    Raises:
        InvalidInput: with the tokens that were found and the limit.
    """
    examples = [example for _, example in spec.located()]
    path = model.folder / "tokenizer.json"
    if path.is_file():
        status = path.stat()
        growth = _growth(path, status.st_size, status.st_mtime_ns)
        most = sum(len(text.encode()) for one in examples for text in (_prompt(one), *_answers(one)))
        if growth is not None and growth * most <= limit:
            return
    total = 0
    for piece in _pieces(examples):
        total += count(model, piece).total
        if total > limit:
            raise InvalidInput(
                f"the examples have {total:,} tokens or more together; a job may have {limit:,}", param="examples"
            )


def _pieces(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Examples that are counted in one go."""
    start = size = 0
    for at, example in enumerate(examples):
        size += sum(len(text) for text in (_prompt(example), *_answers(example)))
        if size >= PIECE_CHARACTERS:
            yield examples[start : at + 1]
            start, size = at + 1, 0
    if start < len(examples):
        yield examples[start:]


@dataclass(frozen=True)
class Tokens:
    """A list of examples in tokens."""

    rows: int
    total: int
    """Of prompts and all answers, each prompt counted once."""
    answers: int
    """Of answers alone."""


def count(model: Model, examples: Sequence[Example]) -> Tokens:
    """The tokens of examples; where the model has no `tokenizer.json`, one for each four bytes."""
    answers = [answer for example in examples for answer in _answers(example)]
    texts = list(dict.fromkeys([*map(_prompt, examples), *answers]))
    path = model.folder / "tokenizer.json"
    if path.is_file():
        status = path.stat()
        counted = _count(_tokenizer(path, status.st_size, status.st_mtime_ns), texts)
    else:
        counted = [-(-len(text.encode()) // BYTES_A_TOKEN) for text in texts]
    length = dict(zip(texts, counted, strict=True))
    of_answers = sum(length[answer] for answer in answers)
    return Tokens(len(examples), sum(length[_prompt(example)] for example in examples) + of_answers, of_answers)


def _count(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    lengths: list[int] = []
    deadline = time.monotonic() + COUNT_SECONDS
    while len(lengths) < len(texts):
        if time.monotonic() > deadline:
            raise unusable(f"its tokenizer takes more than {COUNT_SECONDS:g} s over these examples")
        # One alone first: a batch that fails does so when all of it is done.
        batch = texts[len(lengths) : len(lengths) + (BATCH if lengths else 1)]
        with working_tokenizer():
            lengths += map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False))
    return lengths


def _special_prefix(tokenizer: Tokenizer) -> int:
    """How many special tokens the tokenizer puts before a text."""
    with working_tokenizer():
        bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return next((start for start in range(len(full)) if full[start : start + len(bare)] == bare), 0)


def _prompt(example: Example) -> str:
    """The prompt with what was said before it; what a chat template writes between is not counted."""
    return "".join(turn.content for turn in example.chat) if example.turns else example.prompt


def _answers(example: Example) -> Sequence[str]:
    return example.choices or (example.completion,)


def _bytes(example: Example) -> int:
    return len(_prompt(example).encode()) + max(len(answer.encode()) for answer in _answers(example))


@lru_cache(maxsize=2)
def _tokenizer(path: Path, size: int, changed: int) -> Tokenizer:
    with working_tokenizer():
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=256)
def _growth(path: Path, size: int, changed: int) -> int | None:
    """Tokens a byte of text, at most; None where that is unknown."""
    parts = head(path)
    try:
        return None if parts is None else _growth_of(parts)
    except (TypeError, ValueError, RecursionError):  # what no tokenizer writes
        raise unusable("its tokenizer.json is not readable") from None


def _growth_of(parts: dict[str, Any]) -> int | None:
    growth = METASPACE_GROWTH if '"Metaspace"' in json.dumps(parts.get("pre_tokenizer")) else 1
    replaced = 1
    known = len(json.dumps(parts["post_processor"])) <= 40 * MARGIN_TOKENS
    for normalizer in _normalizers(parts["normalizer"]):
        if normalizer["type"] == "Replace":
            factor = _replacement_growth(normalizer)
            replaced *= factor or max(1, len(str(normalizer.get("content")).encode()))
        else:
            factor = GROWTH.get(normalizer["type"])
        known = known and factor is not None
        growth *= factor or 1
    if replaced > MAX_REPLACED:
        raise unusable(f"its tokenizer.json makes texts {replaced:,} times as long before it reads them")
    return growth if known else None


def _normalizers(value: object) -> Iterator[dict[str, Any]]:
    """The normalizers of a sequence, or the one that there is."""
    if isinstance(value, dict):
        inner = value.get("normalizers")
        if isinstance(inner, list):
            for one in inner:
                yield from _normalizers(one)
        else:
            yield {"type": None, **value}


def _replacement_growth(normalizer: dict[str, Any]) -> int | None:
    pattern = normalizer.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    content = normalizer.get("content")
    if not isinstance(replaced, str) or not replaced or not isinstance(content, str):
        return None
    return max(1, math.ceil(len(content.encode()) / len(replaced.encode())))

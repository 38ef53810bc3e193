"""What the files of a tokenizer say of it, read without building it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.model_files import unusable

# What every tokenizer with a mask token calls it; a tokenizer.json lists it without naming its role.
MASK_TOKENS = frozenset({"<mask>", "[MASK]"})


def head(path: Path) -> dict[str, Any] | None:
    """The parts of a `tokenizer.json` that stand before its vocabulary: normalizer, added tokens and others.

    The vocabulary is the bulk of the file and is not decoded: that would cost the first request 0.1 to 1 s. None
    where the file is in another order or unreadable.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    decoder = json.JSONDecoder()
    at = text.find("{") + 1
    parts: dict[str, Any] = {}
    try:
        while not {"normalizer", "pre_tokenizer", "post_processor"} <= parts.keys():
            at = text.index('"', at)
            key, at = decoder.raw_decode(text, at)
            if key == "model":
                return None
            at = text.index(":", at) + 1
            while text[at].isspace():
                at += 1
            parts[key], at = decoder.raw_decode(text, at)
    except (ValueError, IndexError, RecursionError):
        return None
    return parts


def mask_token(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The mask token's text, from `tokenizer_config.json`, else from `tokenizer.json`; None where neither tells."""
    told = tokenizer_config.get("mask_token")
    token = told.get("content") if isinstance(told, dict) else told
    if isinstance(token, str) and token:
        return token
    path = folder / "tokenizer.json"
    added = (head(path) or {}).get("added_tokens") if path.is_file() else None
    names = {one.get("content") for one in added or () if isinstance(one, dict)} if isinstance(added, list) else set()
    found = [name for name in MASK_TOKENS if name in names]
    return found[0] if len(found) == 1 else None


@contextlib.contextmanager
def working_tokenizer() -> Iterator[None]:
    """Refuse a model whose tokenizer fails at what is done inside.

    `tokenizers` raises `Exception` itself and nothing narrower; where a file is made to confuse it, Rust panics, which
    is no Exception at all.

    Raises:
        UnusableModel: without what the package says, which may hold the text.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise unusable("its tokenizer.json does not hold a tokenizer that works") from None

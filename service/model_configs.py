"""What the configuration of a model and of its tokenizer may say: nothing that runs or fetches code, no size that the
weights do not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.model_files import MAX_LISTING_BYTES, Fingerprint, read_json, shown, unusable
from service.weights import Tensor

# Written by transformers itself into configs (the last for Gemma 3): names and a number that choose no code.
INERT_KEYS = frozenset({"_name_or_path", "_model_name_or_path", "_commit_hash", "_sliding_window_pattern"})
# Keys that make transformers run other code, import packages or read other files, with the reason in words.
REFUSED_KEYS = {
    "auto_map": "that is, code of its own, which is never run",
    "custom_pipelines": "that is, code of its own, which is never run",
    "trust_remote_code": "which asks for code of its own to be run, and that never happens",
    "quantization_config": "and quantized weights cannot be decomposed; take the model it was made from",
    "compression_config": "and compressed weights cannot be decomposed; take the model it was made from",
    "transformers_weights": "which names another file of weights; there should be a model.safetensors",
}
# Of these transformers takes code from the Hub where the value is a repository's name.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# With it transformers loads weights of its own on top of the model's, or another model altogether.
ADAPTER_FILE = "adapter_config.json"
# The files that a tokenizer is built of.
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")
# A size that no tensor reaches is believed up to here: windows and the like are sizes of no tensor.
SMALL = 4096
# A loop of a model that shares one layer's weights may have more turns than tensors.
FEW_LAYERS = 64
SIZES = ("_size", "_dim", "_heads", "_experts", "_inner", "_embd", "_model")
LAYERS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers"})
# Sides of some tensor in every architecture.
SIDES = frozenset({"vocab_size", "hidden_size", "n_embd"})
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
# Their positions begin behind the padding token's, so that a 514 in the config means 512 tokens.
POSITIONS_BEHIND_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, refused where it could make a loader run or fetch anything.

    Raises:
        UnusableModel: naming the key.
    """
    config = read_json(folder / "config.json")
    _refuse_code(config, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise unusable("its config.json has no `model_type`, which says what architecture it is of")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise unusable("the `architectures` of its config.json are not a list of names")
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None and part[key] not in DTYPES:
                raise unusable(f"the `{key}` of its config.json is none of {', '.join(DTYPES)}")
    return config


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, or nothing where there is none; refused as a config is.

    Raises:
        UnusableModel: naming the key.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path, MAX_LISTING_BYTES) if path.is_file() else {}
    _refuse_code(config, path.name)
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and name.isidentifier() and re.search("Tokeniz|Backend$", name)):
        raise unusable("the `tokenizer_class` of its tokenizer_config.json is not the name of a tokenizer")
    return config


def check_files(files: Fingerprint) -> None:
    """Refuse files that transformers would read beside those that are checked, and tokenizers beyond reason.

    Raises:
        UnusableModel: naming the file.
    """
    for name, size, *_ in files:
        if name == ADAPTER_FILE:
            raise unusable(
                f"it has an {ADAPTER_FILE}, that is, an adapter beside or instead of the model; merge it into the model"
            )
        if name.endswith(TOKENIZER_SUFFIXES) and size > MAX_LISTING_BYTES:
            raise unusable(f"its {shown(name)} has {size:,} bytes; at most {MAX_LISTING_BYTES:,} are read")


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a config whose sizes are not those of the weights: a loader would take memory for what it claims.

    Whether each tensor has the shape that the architecture gives it, the worker checks, which knows the architecture.

    Raises:
        UnusableModel: naming the key, and what the weights have.
    """
    sides = {n for tensor in tensors.values() for n in tensor.shape}
    most = max(sides, default=0)
    for key, n in _numbers(config):
        named = f"the `{shown(key)}` of its config.json is {_told(n)}"
        if key in LAYERS and n > max(len(tensors), FEW_LAYERS):
            raise unusable(
                f"{named}, and its weights hold {len(tensors):,} tensors, which are no such number of layers"
            )
        if (key.startswith(("num_", "n_")) or key.endswith(SIZES)) and n > max(most, len(tensors), SMALL):
            raise unusable(f"{named}; no tensor of its weights is as large: the largest side is {most:,}")
        if key in SIDES and n not in sides:
            raise unusable(f"{named}, and no tensor of its weights has such a side")


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number of a config by its key, those of a list by the list's."""
    for part in _parts(config):
        for key, value in part.items():
            for n in value if isinstance(value, list) else [value]:
                if isinstance(n, int | float) and not isinstance(n, bool):
                    yield key, n


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model takes, None where its config does not say."""
    reserved = 0
    if is_masked(config) and config.get("model_type") in POSITIONS_BEHIND_PADDING:
        padding = config.get("pad_token_id")
        reserved = 1 + (padding if isinstance(padding, int) else 1)  # 1 is the default of all of them
    for part in _parts(config):
        for key in CONTEXT_KEYS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value - reserved
    return None


def is_masked(config: Mapping[str, Any]) -> bool:
    """Whether a config is a masked language model's: RoBERTa's, BERT's, DistilBERT's."""
    return any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and, of one that has several models, its text model's."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _refuse_code(config: Mapping[str, Any], name: str) -> None:
    for key in _keys(config):
        if key in REFUSED_KEYS:
            raise unusable(f"its {name} has the key `{key}`, {REFUSED_KEYS[key]}")
        if name == "config.json" and key.startswith("_") and key not in INERT_KEYS:
            raise unusable(
                f"its {name} has the key `{shown(key)}`; keys that begin with `_` can choose what code is loaded "
                "(CVE-2026-4372). Remove it if you trust where the model comes from."
            )
    for key in IMPLEMENTATIONS:
        for part in _parts(config):
            if part.get(key) is not None and part[key] not in KNOWN_IMPLEMENTATIONS:
                raise unusable(f"the `{key}` of its {name} is none that comes with transformers; remove the key")


def _keys(value: object) -> Iterator[str]:
    """The keys of all objects nested in a decoded JSON value."""
    level = [value]
    while level:
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                yield from one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        level = inner


def _told(n: float) -> str:
    return f"{n:,.0f}" if abs(n) < 1e15 else f"{n:.3g}" if isinstance(n, float) else f"over {10**15:,}"

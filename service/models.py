"""The models that are installed: folders below `DATA/models`, checked without torch before any job may use them.

Nothing here runs or unpickles what a folder holds: JSON and the headers of safetensors files are read, no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from service.errors import C2IError, InvalidInput, ModelNotFound, UnusableModel
from service.jobs import MODEL_ID, check_model_id
from service.tokenizer_files import mask_token

# Written by a download from the Hub: the commit that was resolved.
REVISION_FILE = ".revision"
MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# Written by transformers itself into configs (the last for Gemma 3): names and a number that choose no code.
INERT_KEYS = frozenset({"_name_or_path", "_model_name_or_path", "_commit_hash", "_sliding_window_pattern"})
# Their positions begin behind the padding token's, so that a 514 in the config means 512 tokens.
POSITIONS_BEHIND_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class Model:
    """An installed model that passed every check."""

    id: str
    folder: Path
    revision: str
    """The Hub's commit, else the sha256 of the configuration and the weights' headers."""
    architecture: str
    context_length: int | None
    parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    """Of each tensor by its name."""
    dtype: str
    bytes: int
    chat: bool
    """Whether its tokenizer has a chat template."""
    masked: bool
    """Whether it is a masked language model; else it is a causal one."""
    mask_token: str | None
    """Of a masked language model: what stands once in each prompt, where the answer belongs. None where its files do
    not say."""


def find_models(root: Path) -> Iterator[tuple[str, Model | C2IError]]:
    """Every model below `root` by ID, each with its description or the reason why it cannot be used."""
    for config in sorted([*root.glob("*/config.json"), *root.glob("*/*/config.json")]):
        model_id = config.parent.relative_to(root).as_posix()
        if not MODEL_ID.fullmatch(model_id):
            continue
        try:
            yield model_id, resolve(root, model_id)
        except C2IError as error:
            yield model_id, error


def resolve(root: Path, model_id: str) -> Model:
    """The model of this ID.

    Raises:
        InvalidInput: what is no model ID.
        ModelNotFound: no such folder.
        UnusableModel: it runs code of its own, has only pickle weights, or cannot be read.
    """
    check_model_id(model_id)
    folder = root / model_id
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"no model {model_id} is installed. `c2i models` lists what is; `c2i models add {model_id}` adds it.",
            param="model",
        )
    # A changed file is a changed key; an unchanged model is read once.
    return _read(root, model_id, _fingerprint(root, folder))


def _fingerprint(root: Path, folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of each file; nothing may lead out of the models' folder."""
    inside = root.resolve()
    at_home = folder.resolve().is_relative_to(inside)
    entries = []
    # A submission waits for this: what is no link lies where its folder does, and is not resolved.
    with os.scandir(folder) as files:
        for file in sorted(files, key=lambda file: file.name):
            if not at_home or (file.is_symlink() and not Path(file).resolve().is_relative_to(inside)):
                raise _unusable(
                    f"its file {file.name} is a link that leads out of the models' folder; copy the file there"
                )
            if file.is_file():
                status = file.stat()
                entries.append((file.name, status.st_size, status.st_mtime_ns))
    return tuple(entries)


@lru_cache(maxsize=256)
def _read(root: Path, model_id: str, files: tuple[tuple[str, int, int], ...]) -> Model:
    folder = root / model_id
    config = read_config(folder)
    tokenizer = folder / "tokenizer_config.json"
    tokenizer_config = _read_json(tokenizer) if tokenizer.is_file() else {}
    if "auto_map" in _keys(tokenizer_config):
        raise _unusable("its tokenizer_config.json has an `auto_map`, that is, code of its own, which is never run")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    parameters, dtypes, shapes = 0, dict[str, int](), dict[str, tuple[int, ...]]()
    for path in weight_files(folder):
        header = _read_header(path)
        digest.update(path.name.encode())
        digest.update(header)
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                count = math.prod(tensor["shape"])
                parameters += count
                shapes[name] = tuple(tensor["shape"])
                dtypes[tensor["dtype"]] = dtypes.get(tensor["dtype"], 0) + count
    commit = folder / REVISION_FILE
    return Model(
        id=model_id,
        folder=folder,
        revision=commit.read_text().strip() if commit.is_file() else digest.hexdigest(),
        architecture=str(next(iter(config.get("architectures") or ()), config.get("model_type", "unknown"))),
        context_length=context_length(config),
        parameters=parameters,
        shapes=shapes,
        dtype=max(dtypes, key=lambda name: dtypes[name], default="unknown"),
        bytes=sum(size for _, size, _ in files),
        chat=bool(tokenizer_config.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
        masked=is_masked(config),
        mask_token=mask_token(folder, tokenizer_config) if is_masked(config) else None,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, refused where it could make a loader run or fetch anything.

    Raises:
        UnusableModel: naming the key.
    """
    config = _read_json(folder / "config.json")
    for key in _keys(config):
        if key == "auto_map":
            raise _unusable("its config.json has an `auto_map`, that is, code of its own, which is never run")
        if key.startswith("_") and key not in INERT_KEYS:
            raise _unusable(
                f"its config.json has the key `{key}`; keys that begin with `_` can choose what code is loaded "
                "(CVE-2026-4372). Remove it if you trust where the model comes from."
            )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, all of them present.

    Raises:
        UnusableModel: only pickles, a missing shard, or no weights.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise _unusable("its model.safetensors.index.json names no shards")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise _unusable("its model.safetensors.index.json names a shard that is not a file beside it")
            if not (folder / name).is_file():
                raise _unusable(f"its shard {name} is missing; download the model again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise _unusable(
            "it has only pickle weights, which can run code when they are loaded. Convert them to safetensors: "
            "load the model where you trust it and call `save_pretrained`."
        )
    raise _unusable("it has no weights; there should be a model.safetensors")


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens that the model takes, None where its config does not say."""
    reserved = 0
    if is_masked(config) and config.get("model_type") in POSITIONS_BEHIND_PADDING:
        padding = config.get("pad_token_id")
        reserved = 1 + (padding if isinstance(padding, int) else 1)  # 1 is the default of all of them
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in CONTEXT_KEYS:
                value = part.get(key)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value - reserved
    return None


def is_masked(config: dict[str, Any]) -> bool:
    """Whether a config is a masked language model's: RoBERTa's, BERT's, DistilBERT's."""
    return any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())


def too_long(at: str, tokens: int, limit: int) -> InvalidInput:
    """The error for the example at `at`, `examples[3]` say; the worker's is the same."""
    return InvalidInput(
        f"{tokens:,} tokens with its longest completion; the model's context is {limit:,}", param=f"{at}.prompt"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise _unusable(f"its {path.name} is not readable JSON") from None
    if not isinstance(value, dict):
        raise _unusable(f"its {path.name} is not a JSON object")
    return value


def _read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file: eight bytes of its length, then itself."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        tensors = json.loads(header)
        sizes = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        complete = len(header) == length and path.stat().st_size == 8 + length + max(sizes, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise _unusable(f"its {path.name} is not a whole safetensors file; download the model again")
    return header


def _keys(value: object) -> Iterator[str]:
    """The keys of all objects nested in a decoded JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _unusable(reason: str) -> UnusableModel:
    return UnusableModel(f"this model cannot be used: {reason}", param="model")

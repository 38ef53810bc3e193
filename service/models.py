"""The models that are installed: folders below `DATA/models`, checked without torch before any job may use them.

Nothing here runs or unpickles what a folder holds: JSON and the headers of safetensors files are read, no more.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from service.errors import C2IError, InvalidInput, ModelNotFound
from service.jobs import MODEL_ID, check_model_id
from service.model_configs import (
    check_files,
    check_sizes,
    context_length,
    is_masked,
    read_config,
    read_tokenizer_config,
)
from service.model_files import MAX_JSON_BYTES, Fingerprint, fingerprint, read_bytes, shown, unusable
from service.tokenizer_files import mask_token
from service.weights import read_weights

# Written by a download from the Hub: the commit that was resolved.
REVISION_FILE = ".revision"
# A revision is a commit, or a package's name and version.
REVISION = re.compile(r"[\w.:=+@/-]{1,200}", re.ASCII)


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
    files: Fingerprint
    """What was checked, and is to be loaded."""
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
    return _read(root, model_id, fingerprint(root, folder))


def read_folder(folder: Path) -> Model:
    """The model in a folder of one's own, wherever it lies; its files may be links within the folder's parent's.

    Raises:
        UnusableModel: it runs code of its own, has only pickle weights, or cannot be read.
    """
    root = folder.parent.parent  # of a snapshot in the Hub's cache, whose files are links to `../../blobs`
    return _read(root, folder.relative_to(root).as_posix(), fingerprint(root, folder))


def check_unchanged(model: Model) -> None:
    """See that a model's files are those that were checked: what is loaded may have been put there since.

    Raises:
        UnusableModel: a file was changed, added or removed.
    """
    root = model.folder.parents[model.id.count("/")]
    if fingerprint(root, model.folder) != model.files:
        raise unusable("its files were changed while the job ran; submit the job again")


@lru_cache(maxsize=256)
def _read(root: Path, model_id: str, files: Fingerprint) -> Model:
    folder = root / model_id
    check_files(files)
    config = read_config(folder)
    tokenizer_config = read_tokenizer_config(folder)
    weights = read_weights(folder)
    check_sizes(config, weights.tensors)
    digest = hashlib.sha256(read_bytes(folder / "config.json", MAX_JSON_BYTES))
    for name, header in weights.headers.items():
        digest.update(name.encode())
        digest.update(header)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    dtypes = Counter[str]()
    for tensor in weights.tensors.values():
        dtypes[tensor.dtype] += prod(tensor.shape)
    return Model(
        id=model_id,
        folder=folder,
        revision=_revision(folder) or digest.hexdigest(),
        architecture=shown(next(iter(config.get("architectures") or ()), config["model_type"])),
        context_length=context_length(config),
        parameters=dtypes.total(),
        shapes=shapes,
        dtype=dtypes.most_common(1)[0][0],
        bytes=sum(size for _, size, *_ in files),
        files=files,
        chat=bool(tokenizer_config.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
        masked=is_masked(config),
        mask_token=mask_token(folder, tokenizer_config) if is_masked(config) else None,
    )


def _revision(folder: Path) -> str | None:
    """What the folder says that it was made from."""
    if not (folder / REVISION_FILE).is_file():
        return None
    text = read_bytes(folder / REVISION_FILE, 1000).decode(errors="replace").strip()
    if not REVISION.fullmatch(text):
        raise unusable(f"its {REVISION_FILE} holds no revision; remove it")
    return text


def too_long(at: str, tokens: int, limit: int) -> InvalidInput:
    """The error for the example at `at`, `examples[3]` say; the worker's is the same."""
    return InvalidInput(
        f"{tokens:,} tokens with its longest completion; the model's context is {limit:,}", param=f"{at}.prompt"
    )

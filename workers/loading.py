"""A base model and its tokenizer, from a folder that `service.models.resolve` has checked, into memory.

Safetensors only, and no code of a model's own. Before any weight is read the architecture is built without memory, on
torch's meta device, and held against what the weights' headers tell: a config may claim any size.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from service.errors import C2IError, UnusableModel
from service.model_configs import is_masked, read_config
from service.model_files import shown
from service.tokenizer_files import working_tokenizer
from service.weights import BITS, Tensor, read_weights
from workers.examples import Tokenizer
from workers.memory import is_out_of_memory

# An architecture has as many weights as its checkpoint holds, but for weights that are tied or left out.
MORE_WEIGHTS = 1.5
FEW_WEIGHTS = 1_000_000
# Tables that are computed, of positions say, are smaller than the weights, or small.
SMALL_TABLES_BYTES = 2**30
FOLDER_ONLY = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model in memory."""

    folder: Path
    model: nn.Module
    tokenizer: Tokenizer
    dtype: torch.dtype
    masked: bool
    """Whether it is a masked language model; else it is a causal one."""

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding: tokens below this number are known."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding.get_parameter("weight").shape[0]


def load(folder: Path) -> Checkpoint:
    """Model and tokenizer of a checked folder.

    Raises:
        UnusableModel: if transformers cannot load one of them, or they are not for each other.
    """
    model = load_model(folder)
    with _explained("this model's tokenizer"), working_tokenizer():
        loaded: Any = AutoTokenizer.from_pretrained(folder, **FOLDER_ONLY)
    if not isinstance(loaded, PreTrainedTokenizerBase):
        raise UnusableModel("what its tokenizer_config.json names is no tokenizer", param="model")
    tokenizer: Any = loaded
    masked = is_masked(read_config(folder))
    if masked and tokenizer.mask_token is None:
        raise UnusableModel("its tokenizer has no mask token, which a masked language model needs", param="model")
    base = Checkpoint(folder, model, tokenizer, next(model.parameters()).dtype, masked)
    # A token that was added, for images say, may lie behind the embedding and never be used (Gemma 3 has one).
    if tokenizer.vocab_size > base.vocabulary:
        raise UnusableModel(
            f"its tokenizer has {tokenizer.vocab_size:,} tokens and its embedding {base.vocabulary:,} rows: it is "
            "another model's",
            param="model",
        )
    return base


def load_model(folder: Path) -> nn.Module:
    """The model in the dtype of its checkpoint, on the GPU if there is one, its dropout off.

    Masked or causal, as its config's architecture says.

    Raises:
        UnusableModel: if transformers cannot load it, or its weights are not those of its architecture.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns of what is refused below, with the folder's path
    masked = is_masked(read_config(folder))
    tensors = read_weights(folder).tensors
    with _explained(f"this model as a {'masked' if masked else 'causal'} language model"):
        _check_claims(folder, tensors)
        model, info = _auto_model(folder).from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **FOLDER_ONLY,
        )
    _check_complete(info)
    if masked and "attention_mask" not in inspect.signature(model.forward).parameters:
        raise UnusableModel("it takes no attention mask: padding would change its answers", param="model")
    module: nn.Module = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return module


def skeleton(folder: Path) -> nn.Module:
    """The architecture that a folder's config.json makes, on torch's meta device: its weights take no memory."""
    auto_model = _auto_model(folder)
    config = AutoConfig.from_pretrained(folder, **FOLDER_ONLY)
    with torch.device("meta"):
        model: nn.Module = auto_model.from_config(config, trust_remote_code=False)
    return model


def _auto_model(folder: Path) -> Any:
    return AutoModelForMaskedLM if is_masked(read_config(folder)) else AutoModelForCausalLM


def _check_claims(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a config that makes a much larger model than the weights are."""
    model = skeleton(folder)
    claimed = sum(parameter.numel() for parameter in model.parameters())
    held = sum(prod(tensor.shape) for tensor in tensors.values())
    if claimed > MORE_WEIGHTS * held + FEW_WEIGHTS:
        raise UnusableModel(
            f"its config.json makes a model of {claimed:,} weights; its files hold {held:,}", param="model"
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    held_bytes = sum(prod(tensor.shape) * BITS[tensor.dtype] // 8 for tensor in tensors.values())
    if tables > max(SMALL_TABLES_BYTES, held_bytes):
        raise UnusableModel(
            f"its config.json asks for tables of {tables:,} bytes beside {held_bytes:,} of weights: so many positions "
            "are a mistake",
            param="model",
        )


def _check_complete(info: Mapping[str, Any]) -> None:
    """Refuse weights of the wrong shape, weights that are missing, and layers that the architecture lacks."""
    wrong = sorted((name, tuple(found), tuple(expected)) for name, found, expected in info["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        raise UnusableModel(
            f"{len(wrong)} of its weights have another shape than its config.json says, {shown(name)} first: "
            f"{found} and not {expected}",
            param="model",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnusableModel(f"the checkpoint lacks {len(missing)} weights, {missing[0]} first", param="model")
    # A head or a pooler of another task is left out, as transformers does; tables of old versions are no weights.
    surplus = sorted(name for name in info["unexpected_keys"] if re.search(r"\.\d+\..*weight$", name))
    if surplus:
        raise UnusableModel(
            f"the checkpoint holds {len(surplus)} weights in layers that its config.json does not have, "
            f"{shown(surplus[0])} first",
            param="model",
        )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever transformers raises over a folder's content, in words without a path of the server."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, C2IError):
            raise
        raise UnusableModel(f"transformers cannot load {what}: {_words(error)}", param="model") from error


def _words(error: Exception) -> str:
    """The first line of a foreign error, or its name."""
    line = next(iter(str(error).strip().splitlines()), "")
    told = shown(re.sub(r"(?<![\w<])~?/[^\s'\"`,;)]+", "...", line))
    return f"{told} ({type(error).__name__})" if told else type(error).__name__

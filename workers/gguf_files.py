"""A checkpoint as one GGUF file, for llama.cpp and what is built on it: on phones and laptops.

Written with llama.cpp's own package `gguf`, which knows the format and each architecture's names of tensors
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). What llama.cpp computes otherwise than transformers is
turned here: Llama's queries and keys have their rotary halves interleaved, GPT-2's matrices are transposed.

What is written is read back by transformers and must give the checkpoint's logits, within what the numbers allow.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from service.errors import InternalError, InvalidInput
from service.jobs import Gguf
from service.models import read_folder
from service.weights import weight_files
from workers.loading import FOLDER_ONLY

# By `model_type`: the name that the format has for it. Each is tested by reading a model back.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
# GPT-2's weights that are stored input by output.
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
# How text is cut before it is merged, by the name that llama.cpp has for it.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {SPLIT % "{1,3}": "llama-bpe", SPLIT % "": "qwen2"}
# Numbers in a row that share a scale.
Q8_0_BLOCK = 32
# Mean square of the difference of logits over that of the logits: rounding to 16 bits, or to 8 with a scale for 32.
TOLERANCE = {Gguf.F16: 1e-4, Gguf.Q8_0: 1e-2}
CHECKED_TOKENS = 24
GPT2_POSITIONS = 1024
QWEN3_HEAD = 128


def check_gguf(folder: Path) -> None:
    """See, before any work, that a checkpoint can be written as GGUF.

    Raises:
        InvalidInput: the package is missing, or the architecture or the tokenizer is none that is known here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise _refused("this worker lacks the package gguf: have compress-to-impress[quantize] installed there")
    config = AutoConfig.from_pretrained(folder, **FOLDER_ONLY)
    if config.model_type not in ARCHITECTURES:
        raise _refused(f"{config.model_type} is not written as GGUF here; {', '.join(ARCHITECTURES)} are")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise _refused(f"its rotary embedding is scaled ({rope['rope_type']}), which is not written as GGUF here")
    _check_sizes(config)
    _cut_of(_tokenizer(folder))


def _check_sizes(config: PretrainedConfig) -> None:
    """Refuse sizes that transformers does not read back from the format, but guesses."""
    if config.model_type == "gpt2" and config.n_positions != GPT2_POSITIONS:
        raise _refused(f"transformers reads {GPT2_POSITIONS:,} positions of a GPT-2, and it has {config.n_positions:,}")
    guessed = {"qwen2": config.hidden_size // config.num_attention_heads, "qwen3": QWEN3_HEAD}.get(config.model_type)
    head = getattr(config, "head_dim", None) or guessed
    if head != guessed and guessed is not None:
        raise _refused(f"transformers reads heads of {guessed} of a {config.model_type}, and it has heads of {head}")


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"{why}; leave gguf out", param="gguf")


def run(folder: Path, out: Path, kind: str) -> None:
    """`c2i gguf`.

    Raises:
        InvalidInput: naming what is wrong with an argument.
    """
    if kind not in list(Gguf):
        raise InvalidInput(f"{kind} is none of {', '.join(Gguf)}", param="type")
    if out.exists():
        raise InvalidInput(f"{out} exists already; name a new file", param="out")
    if read_folder(folder.absolute()).masked:
        raise InvalidInput("a masked language model is not written as GGUF", param="folder")
    check_gguf(folder)
    write_gguf(folder, out, Gguf(kind))
    print(f"Written to {out}")


def write_gguf(folder: Path, path: Path, kind: Gguf) -> None:
    """Write a checkpoint as a GGUF file, and see that it is the same model.

    Args:
        folder: a causal language model's, that `check_gguf` has seen.

    Raises:
        InternalError: what was written is another model when it is read back; it is removed.
    """
    import gguf  # noqa: PLC0415 - of the extra `quantize`

    config = AutoConfig.from_pretrained(folder, **FOLDER_ONLY)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    try:
        _add_sizes(writer, config)
        _add_tokenizer(writer, folder, config.vocab_size)
        is_f16 = kind is Gguf.F16
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if is_f16 else gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in _tensors(folder, config):
            array = _array(tensor.float().numpy(), name, config)
            stored = _stored(array, kind)
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(folder, path, kind)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _stored(array: NDArray[np.float32], kind: Gguf) -> Any:
    """A tensor's type in the file: vectors keep 32 bits, rows that are no whole blocks 16."""
    import gguf  # noqa: PLC0415

    types = gguf.GGMLQuantizationType
    if array.ndim == 1:
        return types.F32
    return types.Q8_0 if kind is Gguf.Q8_0 and array.shape[-1] % Q8_0_BLOCK == 0 else types.F16


def _tensors(folder: Path, config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors by their names in the format."""
    import gguf  # noqa: PLC0415

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                if key.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
                    continue  # tables of old checkpoints
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise InternalError(f"the format has no name for {key}")
                yield name, opened.get_tensor(key)


def _array(array: NDArray[np.float32], name: str, config: PretrainedConfig) -> NDArray[np.float32]:
    """A tensor as llama.cpp takes it."""
    if config.model_type == "gpt2" and name.endswith(TRANSPOSED):
        array = array.T
    if config.model_type == "llama" and ".attn_q." in name:
        array = _interleaved(array, config.num_attention_heads)
    if config.model_type == "llama" and ".attn_k." in name:
        array = _interleaved(array, config.num_key_value_heads)
    return np.ascontiguousarray(array)


def _interleaved(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (heads * 2 * half, ...) with the two halves of each head taken in turn."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _add_sizes(writer: Any, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)


# --- tokenizer --------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> dict[str, Any]:
    """`tokenizer.json`.

    Raises:
        InvalidInput: there is none, or it is no byte-level BPE.
    """
    path = folder / "tokenizer.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    parts = _parts(found)
    if found.get("model", {}).get("type") != "BPE" or not parts or parts[-1].get("type") != "ByteLevel":
        raise _refused("its tokenizer is no byte-level BPE, and no other is written as GGUF here")
    return found


def _parts(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps by which text is cut."""
    cut: dict[str, Any] = tokenizer.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = cut.get("pretokenizers", [cut])
    return steps


def _cut_of(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words: with another the tokens would be others.

    Raises:
        InvalidInput: it has none that is known here.
    """
    match _parts(tokenizer):
        case [{"type": "ByteLevel"}]:
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]:
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}}, {"type": "ByteLevel"}] if pattern in SPLITS:
            return SPLITS[pattern]
    raise _refused(f"its tokenizer cuts text as none of {', '.join(['gpt-2', 'smollm', *SPLITS.values()])} does")


def _add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Tokens, merges, special tokens and the chat template; a token for each row of the embedding."""
    import gguf  # noqa: PLC0415

    found = _tokenizer(folder)
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for token, i in found["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in found.get("added_tokens", []):
        if added["id"] < rows:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut_of(found))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    tokenizer = AutoTokenizer.from_pretrained(folder, **FOLDER_ONLY)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.add_special_token = {}  # told above, as the tokenizer does it
    special.add_to_gguf(writer, quiet=True)


# --- check ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check(folder: Path, path: Path, kind: Gguf) -> None:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **FOLDER_ONLY)
    ids = torch.arange(CHECKED_TOKENS)[None] * 7 % original.config.vocab_size
    expected: Tensor = original.eval()(input_ids=ids).logits
    del original
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, **FOLDER_ONLY
        )
    except Exception as error:  # transformers guesses the sizes that it has no place for
        raise InternalError(f"what was written as GGUF cannot be read back ({type(error).__name__})") from error
    off = float((read.eval()(input_ids=ids).logits - expected).square().mean() / expected.square().mean())
    if not off <= TOLERANCE[kind]:
        raise InternalError(
            f"what was written as GGUF is another model when it is read back: its logits differ by {100 * off:.2g} % "
            "of their square"
        )

"""A checkpoint in fewer bits: weights of eight by torchao, of four by bitsandbytes.

Both store safetensors that stock transformers loads, on processors and GPUs alike. torchao's int8 keeps a scale for
each row and loses little; its int4 has no form that an x86 processor runs, which bitsandbytes' NF4 has (Dettmers et
al., https://arxiv.org/abs/2305.14314). Neither takes embeddings and head: those stay, in 16 bits at most.

Weights are read from a checkpoint on disk, not from a model in memory: whatever was written is what is quantized.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from service.errors import InternalError, InvalidInput
from service.jobs import Quantize
from service.model_configs import is_masked
from service.model_files import read_json
from service.reports import Quantized
from workers.evaluation import Outcome, answer_logits, differences, evaluate, metrics
from workers.examples import Encoded, batches
from workers.loading import FOLDER_ONLY
from workers.shards import copy_files
from workers.speed import weight_bytes
from workers.subject import Subject
from workers.verdict import WORDS

LIBRARIES = {Quantize.INT8: "torchao", Quantize.INT4: "bitsandbytes"}
METHODS = {
    Quantize.INT8: "integers of 8 bits, a scale for each row",
    Quantize.INT4: "NF4, 4 bits, a scale for every 64 weights",
}
# The modules whose weights each takes.
TAKEN: dict[Quantize, tuple[type[nn.Module], ...]] = {Quantize.INT8: (nn.Linear,), Quantize.INT4: (nn.Linear, Conv1D)}
# What its kernels for processors take of a weight; they fail on others, which stay as they are.
INT4_ROWS = 32
INT4_COLUMNS = 64
# Of the weights between embeddings and head: with fewer taken the model would hardly be smaller.
FEWEST_TAKEN = 0.5
TAKES = {
    Quantize.INT8: "linear layers",
    Quantize.INT4: f"linear layers of multiples of {INT4_ROWS} rows and {INT4_COLUMNS} columns",
}
# On how many examples the checkpoint read back is held against the one in memory: the same code on the same numbers.
CHECKED_EXAMPLES = 8
TOLERANCE = 1e-3


def check_quantizable(model: nn.Module, bits: Quantize) -> None:
    """See, before any work, that this worker can quantize this model.

    Raises:
        InvalidInput: a package is missing, or most of the model's weights are of a kind that is not quantized.
    """
    library = LIBRARIES[bits]
    if importlib.util.find_spec(library) is None:
        raise InvalidInput(
            f"this worker lacks {library}, which {bits} needs: leave it out, or have compress-to-impress[quantize] "
            "installed there",
            param="quantize",
        )
    part = quantized_part(model, bits)
    if part < FEWEST_TAKEN:
        other = "; int4 takes it" if bits is Quantize.INT8 and _are_conv1d(model) else ""
        raise InvalidInput(
            f"{bits} takes {TAKES[bits]}, and only {100 * part:.0f} % of the weights of {type(model).__name__} are of "
            f"such{other}; leave it out",
            param="quantize",
        )


def quantized_part(model: nn.Module, bits: Quantize) -> float:
    """Of the weights between embeddings and head, the part that is quantized."""
    taken = {id(module.weight) for module in model.modules() if _is_taken(module, bits)}
    whole = _ends(model)
    between = [p for p in model.parameters() if p.ndim > 1 and id(p) not in whole]
    return sum(p.numel() for p in between if id(p) in taken) / max(1, sum(p.numel() for p in between))


def _is_taken(module: nn.Module, bits: Quantize) -> bool:
    if not isinstance(module, TAKEN[bits]):
        return False
    rows, columns = module.get_parameter("weight").shape
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    return bits is Quantize.INT8 or (rows % INT4_ROWS == 0 and columns % INT4_COLUMNS == 0)


def _ends(model: Any) -> set[int]:
    """The weights of embeddings and head."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return {id(module.weight) for module in [*modules, *([head] if head is not None else [])]}


def _are_conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def quantize(source: Path, folder: Path, bits: Quantize) -> Any:
    """Write a checkpoint's quantized form into a new folder.

    Returns:
        The quantized model in memory, as it was before anything ran on it.
    """
    model = _load(source, quantization_config=_config(bits, source), dtype=_float(source))
    folder.mkdir()
    copy_files(source, folder)
    for told_of_others in ("model.safetensors.index.json", "manifest.json"):
        (folder / told_of_others).unlink(missing_ok=True)
    # Before it has run: bitsandbytes packs weights for a processor when they are first used, and writes them so.
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors gives what it writes to its owner alone
    model.eval()
    return model


def ship(
    out: Path, base: Path, bits: Quantize, subject: Subject, examples: Sequence[Encoded], before: Outcome, seed: int
) -> Quantized:
    """Write `quantized/` from `model/`, test it, and see that what was written is what was tested.

    Args:
        out: the folder of artifacts.
        base: the base model's folder.
        examples: those to test on.
        before: of `model/` on them.

    Raises:
        InternalError: the model answers no example any more, or is another when it is read back.
    """
    folder = out / "quantized"
    model = quantize(out / "model", folder, bits)
    after = evaluate(model, examples, subject.objective, subject.layout)
    if after.broken:
        raise InternalError(f"in {bits} it has no finite loss on {after.broken} of {len(examples)} examples")
    held = replace(subject.layout, tokens=subject.layout.limits.get("forward", subject.layout.tokens))
    batch = next(batches(examples[:CHECKED_EXAMPLES], held)).to(next(subject.model.parameters()).device)
    with torch.no_grad():
        expected = answer_logits(model, batch)
        del model
        reloaded = answer_logits(_load(folder, dtype="auto").eval(), batch)
    difference = float((reloaded.float() - expected.float()).abs().max())
    if not difference <= TOLERANCE:
        raise InternalError(f"in {bits}, read back, its logits differ by {difference:.2g} from what was tested")
    scores, size = metrics(after, examples), weight_bytes(folder)
    return Quantized(
        **{name: getattr(scores, name) for name in ("accuracy", "exact_match", "loss")},
        bits=bits,
        method=METHODS[bits],
        library=f"{LIBRARIES[bits]} {version(LIBRARIES[bits])}",
        dtype=str(_float(out / "model")).removeprefix("torch."),
        bytes=size,
        fraction=size / weight_bytes(base),
        differences=differences(before, after, seed),
        verification=difference,
    )


def tell(found: Quantized, *, unseen: bool) -> str:
    """What the verdict says of it.

    Args:
        unseen: whether it was tested on examples that the model was not made from.
    """
    difference = found.differences[0]
    value = getattr(found, difference.metric)
    p = "p < .001" if difference.p < 0.001 else f"p = {difference.p:.3f}"
    return (
        f"In {found.bits} it has {100 * found.fraction:.0f} % of the base's bytes: "
        f"{WORDS[difference.metric]} {value - difference.value:.3f} to {value:.3f} ({difference.value:+.3f}, 95 % "
        f"interval {difference.low:+.3f} to {difference.high:+.3f}, {p})"
        f"{'' if unseen else ' on the examples that it was made from'}."
    )


def _left_alone(source: Path, bits: Quantize) -> list[str]:
    """The layers of a checkpoint that stay as they are, its head too: a list of one's own replaces the default."""
    config = AutoConfig.from_pretrained(source, **FOLDER_ONLY)
    with torch.device("meta"):
        model = _auto_model(source).from_config(config)
    ends = _ends(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, TAKEN[bits])]
    return [name for name, module in layers if id(module.weight) in ends or not _is_taken(module, bits)]


def _auto_model(folder: Path) -> Any:
    return AutoModelForMaskedLM if is_masked(read_json(folder / "config.json")) else AutoModelForCausalLM


def _load(folder: Path, **options: Any) -> Any:
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    auto_model = _auto_model(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return auto_model.from_pretrained(folder, device_map=device, use_safetensors=True, **options, **FOLDER_ONLY)


def _float(source: Path) -> torch.dtype:
    """Of what is not quantized: the checkpoint's own type, where that has no more than 16 bits."""
    config = read_json(source / "config.json")
    return torch.float16 if "float16" in (config.get("dtype"), config.get("torch_dtype")) else torch.bfloat16


def _config(bits: Quantize, source: Path) -> Any:
    if bits is Quantize.INT4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_float(source),
            llm_int8_skip_modules=_left_alone(source, bits),
        )
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: PLC0415 - of the extra `quantize`

    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))

"""Adapters and merged models out, and the check that what was written is what was measured.

The adapter is a PEFT LoRA that subtracts the removed components, exactly; the merged model has the base's files, tensor
for tensor and byte for byte, with only the pruned weights changed, and what can be cut off (`workers.shrinking`) left
out.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from service.errors import InternalError, UnusableModel
from service.reports import Shipped
from service.weights import weight_files
from workers.adapters import Update, updates
from workers.evaluation import answer_logits
from workers.examples import Batch
from workers.loading import Checkpoint, load_model
from workers.memory import is_out_of_memory
from workers.pruning import applied, cleared, zeroed
from workers.ranking import Plan
from workers.shards import MANIFEST, Edit, copy_files, layer_names, save, tensor_owners, write_index, write_shard
from workers.shrinking import Anatomy, Smaller, as_zeros, examine, layer_of, parameters_of_smaller, shrink
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target

# Largest logit difference between an artifact read back and the model in memory. In 16 bits the adapter keeps the
# removed part at full precision beside the weight and the merged weight rounds it: that rounding is allowed for.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.5
# Of each of two rows that a smaller model is compared on.
CHECKED_TOKENS = 32


def write_adapter(
    folder: Path,
    model_id: str,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    units: Sequence[Unit] = (),
    *,
    masked: bool = False,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`: one LoRA a module, whatever its row blocks.

    Scaling is 1 for every module, and for the whole adapter too: a server that reads `r` and `lora_alpha` but no
    pattern does the same. Where a branch goes with its bias, every module of the adapter has a bias of its own
    (`lora_bias`), which PEFT knows and few servers do. An empty plan is an adapter of one rank that is zero. PEFT knows
    no task type for a masked language model.
    """
    found = updates(targets, spectra, plan, units)
    if not found:
        like = targets[0].whole_weight
        rows, columns = like.shape
        found = {targets[0].module_name: Update(like.new_zeros(1, columns), like.new_zeros(rows, 1), None)}
    with_biases = any(update.bias is not None for update in found.values())
    tensors: dict[str, Tensor] = {}
    for name, update in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.A.cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.B.cpu()
        if with_biases:
            bias = update.B.new_zeros(update.B.shape[0]) if update.bias is None else update.bias
            tensors[f"base_model.model.{name}.lora_B.bias"] = bias.cpu()
    ranks = {name: update.A.shape[0] for name, update in found.items()}
    r = max(ranks.values())
    config = LoraConfig(
        task_type=None if masked else "CAUSAL_LM",
        base_model_name_or_path=model_id,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=sorted(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != r},
        fan_in_fan_out=all(t.transposed for t in targets if t.module_name in found),
        lora_bias=with_biases,
    )
    # peft keeps target modules in a set: written as it is, the file would differ from run to run.
    config.target_modules = sorted(ranks)
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def write_model(
    folder: Path,
    base: Checkpoint,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    units: Sequence[Unit] = (),
) -> Shipped:
    """Write the base's own files with the pruned weights in them, smaller where a plan takes what can be cut off.

    A smaller model is loaded and compared with the one in memory; one that does not load, or is another, is written
    once more with zeros in it instead. `manifest.json` is written last and says what was written.
    """
    anatomy = examine(base)
    smaller = shrink(anatomy, plan, units)
    pruned = Pruned(base, targets, spectra, plan, units)
    why = _written_smaller(folder, pruned, anatomy, smaller) if smaller.config else None
    if why is not None:
        shutil.rmtree(folder, ignore_errors=True)
        smaller = as_zeros(anatomy, plan, units, why)
    if smaller.config is None:
        _write(folder, pruned, anatomy, smaller)
    shipped = Shipped(
        parameters=parameters_of_smaller(anatomy, smaller),
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
        layers=list(smaller.cut.layers) if len(smaller.cut.layers) < anatomy.layers else None,
        gone=smaller.gone,
        zeros=smaller.zeros,
    )
    (folder / MANIFEST).write_text(shipped.model_dump_json(indent=2) + "\n")
    return shipped


def shipped_of(folder: Path) -> Shipped:
    """What `write_model` wrote into a folder."""
    return Shipped.model_validate_json((folder / MANIFEST).read_bytes())


@dataclass(frozen=True, eq=False)
class Pruned:
    """A base model and what a plan takes from it."""

    base: Checkpoint
    targets: Sequence[Target]
    spectra: Mapping[str, Spectrum]
    plan: Plan
    units: Sequence[Unit]

    def applied(self) -> AbstractContextManager[None]:
        """The base with the plan applied, in memory."""
        return applied(self.targets, self.spectra, self.plan, self.units)

    def changed(self) -> set[str]:
        """The weights and biases that the plan changes, by their names in the model."""
        changed = [t.module.get_parameter("weight") for t in self.targets if self.plan.components.get(t.name)]
        changed += [p for unit, _, target in cleared(self.plan, self.units) for p in zeroed(unit, target)]
        wanted = {id(parameter) for parameter in changed}
        return {name for name, parameter in self.base.model.named_parameters() if id(parameter) in wanted}


def _written_smaller(folder: Path, pruned: Pruned, anatomy: Anatomy, smaller: Smaller) -> str | None:
    """Why what was written is not the pruned model; None where it is."""
    try:
        _write(folder, pruned, anatomy, smaller)
        difference = _distance(folder, pruned)
    except (UnusableModel, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"what is smaller does not load: {error}"
    if not difference <= limit_of(pruned.base.dtype):
        return f"what is smaller predicts otherwise: logits differ by {difference:.2g}"
    return None


def _write(folder: Path, pruned: Pruned, anatomy: Anatomy, smaller: Smaller) -> None:
    base, model = pruned.base.folder, pruned.base.model
    folder.mkdir(parents=True)
    copy_files(base, folder)
    changed, dropped = pruned.changed(), set(range(anatomy.layers)) - set(smaller.cut.layers)
    touched = {name for name in {*changed, *smaller.slices} if layer_of(name, anatomy.prefix) not in dropped}
    parameters = {name: p for name, p in model.named_parameters() if name in touched}
    owners = tensor_owners(base, model, parameters)  # by their content: before the plan is applied
    edit = Edit(
        {owners[name][1]: own for name, own in smaller.slices.items()},
        layer_names(base, model, anatomy.prefix, anatomy.layers, smaller.cut.layers) if dropped else {},
    )
    written: dict[str, dict[str, int]] = {}
    with pruned.applied():
        for shard in weight_files(base):
            mine = {
                key: parameters[name].detach()
                for name, (file, key) in owners.items()
                if file == shard.name and name in changed
            }
            written[shard.name] = write_shard(shard, folder, mine, edit)
    if smaller.config is not None:
        (folder / "config.json").write_text(smaller.config)
        write_index(folder, written, parameters_of_smaller(anatomy, smaller))


@torch.no_grad()
def _distance(folder: Path, pruned: Pruned) -> float:
    """The largest difference of logits between a written model and the one in memory, on tokens drawn by chance."""
    tokens = checked_tokens(pruned.base)
    with pruned.applied():
        expected = pruned.base.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    found = load_model(folder)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return _difference(found, expected)


@torch.no_grad()
def reload_check(folder: Path, base: Checkpoint, batch: Batch, expected: Tensor) -> tuple[float, float]:
    """Read both artifacts back from disk and compare their logits on a batch with those of the adapted model.

    The adapter is put on `base.model`, which is left as it was.

    Args:
        folder: holds `adapter/` and `model/`.
        expected: (Q, vocabulary) logits of the adapted model in memory.

    Returns:
        The largest absolute differences: adapter, merged model.

    Raises:
        InternalError: if one is over the tolerance: nothing may then be published.
    """
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        with_adapter = PeftModel.from_pretrained(base.model, folder / "adapter").eval()
    adapter = _difference(answer_logits(base.model, batch), expected)
    with_adapter.unload()
    del with_adapter
    _check(adapter, "adapter", base)
    return adapter, model_check(folder, base, batch, expected)


@torch.no_grad()
def model_check(folder: Path, base: Checkpoint, batch: Batch, expected: Tensor) -> float:
    """As `reload_check`, of `model/` alone."""
    merged = _difference(answer_logits(load_model(folder / "model"), batch), expected)
    _check(merged, "model", base)
    return merged


def _check(difference: float, artifact: str, base: Checkpoint) -> None:
    limit = limit_of(base.dtype)
    if not difference <= limit:
        raise InternalError(
            f"the {artifact} read back differs from the adapted model by {difference:.2g}, at most {limit:g} is "
            "allowed; nothing was published"
        )


def checked_tokens(base: Checkpoint) -> Tensor:
    """(2, CHECKED_TOKENS) drawn by chance, always the same."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(base.vocabulary, (2, CHECKED_TOKENS), generator=draw)
    return drawn.to(next(base.model.parameters()).device)


def limit_of(dtype: torch.dtype) -> float:
    """The largest difference of logits that is rounding, for a model in this dtype."""
    return TOLERANCE.get(dtype, TOLERANCE_16_BIT)


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected.float()).abs().max())

"""Adapters and merged models out, and the check that what was written is what was measured.

The adapter is a PEFT LoRA that subtracts the
removed components, exactly; the merged model has the base's files, tensor for tensor and byte for byte, with only
the pruned weights changed.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import InternalError, UnusableModel
from service.weights import weight_files
from workers.adapters import Update, updates
from workers.evaluation import answer_logits
from workers.examples import Batch
from workers.loading import Checkpoint, load_model
from workers.pruning import applied, cleared, zeroed
from workers.ranking import Plan
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target

# What a tokenizer or a configuration is made of, and the licence; weights are written, everything else is left behind.
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
# Largest logit difference between an artifact read back and the model in memory. In 16 bits the adapter keeps the
# removed part at full precision beside the weight and the merged weight rounds it: that rounding is allowed for.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
TOLERANCE_16_BIT = 0.5


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
    _save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def write_model(
    folder: Path,
    base: Checkpoint,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    units: Sequence[Unit] = (),
) -> None:
    """Write the base's own files with the pruned weights in them: same shards, names, order, dtype and metadata."""
    changed = _changed(base, targets, plan, units)
    folder.mkdir(parents=True)
    copy_files(base.folder, folder)
    owners = _tensor_owners(base, changed)  # by their content: before the plan is applied
    with applied(targets, spectra, plan, units):
        for shard in weight_files(base.folder):
            mine = {key: changed[name].detach() for name, (file, key) in owners.items() if file == shard.name}
            write_shard(shard, folder, mine)


def _changed(base: Checkpoint, targets: Sequence[Target], plan: Plan, units: Sequence[Unit]) -> dict[str, nn.Parameter]:
    """The weights and biases that the plan changes, by their names in the model."""
    changed = [target.module.get_parameter("weight") for target in targets if plan.components.get(target.name)]
    changed += [parameter for unit, _, target in cleared(plan, units) for parameter in zeroed(unit, target)]
    wanted = {id(parameter) for parameter in changed}
    return {name: parameter for name, parameter in base.model.named_parameters() if id(parameter) in wanted}


def copy_files(base: Path, folder: Path) -> None:
    """Everything of a base model's folder but its weights, and but what a model is not made of."""
    for path in sorted(base.iterdir()):
        copied = path.suffix in COPIED_SUFFIXES or path.name.startswith("LICENSE")
        if copied and path.is_file():
            shutil.copyfile(path, folder / path.name)


def write_shard(shard: Path, folder: Path, changed: Mapping[str, Tensor]) -> None:
    """A file of a base model's weights with some of its tensors changed, in the dtype in which it has them."""
    if not changed:
        shutil.copyfile(shard, folder / shard.name)
        return
    with safe_open(shard, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        metadata = opened.metadata()
    for key, new in changed.items():
        tensors[key] = new.to("cpu", tensors[key].dtype, copy=True).contiguous()
    _save(tensors, folder / shard.name, metadata)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # safetensors gives what it writes to its owner alone


def _tensor_owners(base: Checkpoint, changed: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, str]]:
    """For each changed parameter the shard and its key in the base's checkpoint.

    A checkpoint may leave out the model's prefix or have one more; the content decides, not the name.

    Raises:
        UnusableModel: if the checkpoint stores a weight in another form, fused with others say.
    """
    prefix = getattr(base.model, "base_model_prefix", "")
    found: dict[str, tuple[str, str]] = {}
    for shard in weight_files(base.folder):
        with safe_open(shard, framework="pt") as opened:
            keys = set(opened.keys())
            for name, parameter in changed.items():
                for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
                    if name not in found and key in keys:
                        stored, own = opened.get_tensor(key), parameter.detach().cpu()
                        if stored.shape == own.shape and torch.equal(stored.to(own.dtype), own):
                            found[name] = (shard.name, key)
    missing = sorted(set(changed) - set(found))
    if missing:
        raise UnusableModel(f"the checkpoint stores {missing[0]} in a form that cannot be written back", param="model")
    return found


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
    merged_model = load_model(folder / "model")
    merged = _difference(answer_logits(merged_model, batch), expected)
    limit = TOLERANCE.get(base.dtype, TOLERANCE_16_BIT)
    if not (adapter <= limit and merged <= limit):
        raise InternalError(
            f"the artifacts read back differ from the adapted model: adapter {adapter:.2g}, model {merged:.2g}, "
            f"at most {limit:g} is allowed; nothing was published"
        )
    return adapter, merged


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected.float()).abs().max())

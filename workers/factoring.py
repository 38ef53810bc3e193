"""The written model with low-rank weights as two factors: where a plan leaves k of a weight's components and
k (m + n) < m n, `B` (m, k) and `A` (k, n) are fewer numbers than the weight.

No library loads such a checkpoint, so `model/` stays what it is and this is beside it, with its loader
(`workers.factored`), for who wants it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from service.reports import Factored
from service.weights import weight_files
from workers import factored
from workers.checkpoints import checked_tokens, limit_of
from workers.loading import Checkpoint
from workers.pruning import applied, cleared
from workers.ranking import Plan
from workers.shards import copy_files, save, spellings, write_index
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target

LOADER = "load_factored.py"
# Of a model's numbers; for less nobody takes a second copy.
LEAST_SAVING = 0.01


def low_rank(
    targets: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan, units: Sequence[Unit] = ()
) -> dict[str, list[Target]]:
    """The modules whose weights are fewer numbers as factors, each with its row blocks. A weight that structures are
    taken from as well may have any rank."""
    blocks: dict[str, list[Target]] = {}
    for target in targets:
        blocks.setdefault(target.module_name, []).append(target)
    touched = {target.module_name for _, _, target in cleared(plan, units)}
    found = {}
    for name, own in blocks.items():
        known = all(target.name in spectra for target in own)
        if _saved(own, plan) > 0 and name not in touched and known:
            found[name] = own
    return found


def _saved(blocks: Sequence[Target], plan: Plan) -> int:
    """Numbers that a weight has more than its factors."""
    out, in_ = blocks[0].whole_weight.shape
    rank = max(1, sum(len(_left(target, plan)) for target in blocks))
    return out * in_ - rank * (out + in_)


def _left(target: Target, plan: Plan) -> list[int]:
    """The components that a plan leaves of a target."""
    gone = set(plan.components.get(target.name, ()))
    return [k for k in range(min(target.shape)) if k not in gone]


def factors(blocks: Sequence[Target], spectra: Mapping[str, Spectrum], plan: Plan) -> tuple[Tensor, Tensor]:
    """B (out, k) and A (k, in) of what a plan leaves of a weight, in the weight's dtype; each row block has ranks of
    its own. A weight of which nothing is left has one rank, which is zero."""
    whole = blocks[0].whole_weight
    lefts = [(target, left) for target in blocks if (left := _left(target, plan))]
    k = sum(len(left) for _, left in lefts)
    B, A = whole.new_zeros(whole.shape[0], max(k, 1)), whole.new_zeros(max(k, 1), whole.shape[1])
    at = 0
    for target, left in lefts:
        part_B, part_A = spectra[target.name].factors(target.weight, left)
        ranks = slice(at, at + len(left))
        rows = slice(None) if target.rows is None else target.rows.index
        B[rows, ranks] = part_B.to(B.dtype)
        A[ranks] = part_A.to(A.dtype)
        at = ranks.stop
    return B, A


@torch.no_grad()
def add_factored(
    out: Path,
    base: Checkpoint,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    units: Sequence[Unit] = (),
) -> Factored | None:
    """Write `out/factored` beside `out/model`, if it is smaller and is the adapted model when it is loaded."""
    folder = out / "factored"
    written = write_factored(folder, out / "model", base.model, targets, spectra, plan, units)
    if written is None:
        return None
    tokens = checked_tokens(base)
    with applied(targets, spectra, plan, units):
        expected = base.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    if is_adapted(folder, base, expected):
        return written
    shutil.rmtree(folder)
    return None


def write_factored(
    folder: Path,
    model_folder: Path,
    model: nn.Module,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    units: Sequence[Unit] = (),
) -> Factored | None:
    """Write the checkpoint with factors and its loader, if it is smaller.

    Args:
        model_folder: the written model, none of whose layers is cut off: its files are the template.
        model: the base, as it is.

    Returns:
        What was written; None if nothing was.
    """
    modules = low_rank(targets, spectra, plan, units)
    total = sum(p.numel() for p in model.parameters())
    if sum(_saved(own, plan) for own in modules.values()) < LEAST_SAVING * total:
        return None
    folder.mkdir()
    copy_files(model_folder, folder)
    ranks: dict[str, int] = {}
    written: dict[str, dict[str, int]] = {}
    for shard in weight_files(model_folder):
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as opened:
            keys, metadata = list(opened.keys()), opened.metadata()
            names = {key: name for name in modules for key in spellings(model, f"{name}.weight") if key in keys}
            for key in keys:
                if key not in names:
                    tensors[key] = opened.get_tensor(key)
                    continue
                name, stem = names[key], key.removesuffix("weight")
                B, A = factors(modules[name], spectra, plan)
                ranks[name] = A.shape[0]
                for letter, factor in (("A", A), ("B", B)):
                    tensors[f"{stem}{letter}"] = factor.to("cpu", opened.get_tensor(key).dtype).contiguous()
        save(tensors, folder / shard.name, metadata)
        written[shard.name] = {key: tensor.nbytes for key, tensor in tensors.items()}
    parameters = total - sum(_saved(own, plan) for own in modules.values())
    write_index(folder, written, parameters)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": factored.METHOD, "ranks": dict(sorted(ranks.items()))}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(factored.__file__, folder / LOADER)
    return Factored(
        weights=len(ranks), parameters=parameters, bytes=sum(file.stat().st_size for file in weight_files(folder))
    )


@torch.no_grad()
def is_adapted(folder: Path, base: Checkpoint, expected: Tensor) -> bool:
    """Whether the written factors, loaded, predict what the adapted model does on `checked_tokens`, up to rounding.

    Args:
        expected: (rows, n, vocabulary) its logits.
    """
    tokens = checked_tokens(base)
    loaded = factored.load_factored(folder).to(tokens.device)
    found = loaded(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return float((found.float() - expected.float()).abs().max()) <= limit_of(base.dtype)

"""A checkpoint's files, written anew from the base model's own: same shards, order, dtype and metadata, and one shard
in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import UnusableModel
from service.weights import weight_files
from workers.cuts import Slice

# What a tokenizer or a configuration is made of, and the licence; weights are written, everything else is left behind.
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of a checkpoint's tensors beside their content, by their keys in it."""

    slices: Mapping[str, Slice] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    """Of those that get another name, or go."""

    def __bool__(self) -> bool:
        return bool(self.slices or self.names)


def copy_files(base: Path, folder: Path) -> None:
    """Everything of a base model's folder but its weights, and but what a model is not made of. What was written of
    the base itself is no more true."""
    for path in sorted(base.iterdir()):
        copied = path.suffix in COPIED_SUFFIXES or path.name.startswith("LICENSE")
        if copied and path.is_file() and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)


def write_shard(shard: Path, folder: Path, changed: Mapping[str, Tensor], edit: Edit | None = None) -> dict[str, int]:
    """A file of a base model's weights with some of its tensors changed, in the dtype in which it has them.

    Args:
        changed: by their keys in the base's file, in the base's shape.
        edit: what is cut off them, and which go; a file without any is not written.

    Returns:
        What was written: bytes by key. Nothing where the file is a copy.
    """
    if not changed and not edit:
        shutil.copyfile(shard, folder / shard.name)
        return {}
    edit = edit or Edit()
    tensors: dict[str, Tensor] = {}
    with safe_open(shard, framework="pt") as opened:
        metadata = opened.metadata()
        for key in opened.keys():  # noqa: SIM118 - no mapping
            name = edit.names.get(key, key)
            if name is None:
                continue
            tensor = opened.get_tensor(key)
            if key in changed:
                tensor = changed[key].to("cpu", tensor.dtype, copy=True).contiguous()
            tensors[name] = edit.slices[key].of(tensor) if key in edit.slices else tensor
    if tensors:
        save(tensors, folder / shard.name, metadata)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """A safetensors file that everybody may read."""
    save_file(tensors, path, metadata=metadata)
    path.chmod(0o644)  # safetensors gives what it writes to its owner alone


def write_index(folder: Path, written: Mapping[str, Mapping[str, int]], parameters: int) -> None:
    """Bring the index of shards that was copied into a folder up to date, if there is one.

    Args:
        written: for each file the bytes of its tensors.
        parameters: of the model.
    """
    path = folder / INDEX
    if not path.is_file():
        return
    index = json.loads(path.read_text())
    index["weight_map"] = {key: name for name, own in sorted(written.items()) for key in sorted(own)}
    known = index.get("metadata") or {}
    sizes = {"total_size": sum(sum(own.values()) for own in written.values()), "total_parameters": parameters}
    index["metadata"] = known | {key: size for key, size in sizes.items() if key in known or key == "total_size"}
    path.write_text(json.dumps(index, indent=2) + "\n")


def tensor_owners(folder: Path, model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, str]]:
    """For each parameter the shard and its key in the base's checkpoint.

    A checkpoint may leave out the model's prefix or have one more; the content decides, not the name.

    Raises:
        UnusableModel: if the checkpoint stores a weight in another form, fused with others say.
    """
    found: dict[str, tuple[str, str]] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as opened:
            keys = set(opened.keys())
            for name, parameter in wanted.items():
                for key in spellings(model, name):
                    if name not in found and key in keys:
                        stored, own = opened.get_tensor(key), parameter.detach().cpu()
                        if stored.shape == own.shape and torch.equal(stored.to(own.dtype), own):
                            found[name] = (shard.name, key)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UnusableModel(f"the checkpoint stores {missing[0]} in a form that cannot be written back", param="model")
    return found


def layer_names(folder: Path, model: nn.Module, prefix: str, count: int, kept: Sequence[int]) -> dict[str, str | None]:
    """The keys of a checkpoint that get another name when some layers alone are kept, or go: None.

    Args:
        prefix: of the blocks in the model, of which there are `count`.

    Raises:
        UnusableModel: if it cannot be told which tensors are a block's.
    """
    keys: list[str] = []
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as opened:
            keys += opened.keys()
    own = {str(layer) for layer in range(count)}
    for spelt in spellings(model, prefix):
        inside = [key for key in keys if key.startswith(f"{spelt}.")]
        if {key.removeprefix(f"{spelt}.").partition(".")[0] for key in inside} == own:
            break
    else:
        raise UnusableModel(f"the checkpoint names its layers otherwise than {prefix}.0", param="model")
    places = {str(layer): place for place, layer in enumerate(kept)}
    names: dict[str, str | None] = {}
    for key in inside:
        layer, _, rest = key.removeprefix(f"{spelt}.").partition(".")
        name = f"{spelt}.{places[layer]}.{rest}" if layer in places else None
        if name != key:
            names[key] = name
    return names


def spellings(model: nn.Module, name: str) -> tuple[str, str, str]:
    """What a checkpoint may call what has this name in the model."""
    prefix = getattr(model, "base_model_prefix", "")
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"

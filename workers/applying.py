"""`c2i apply`: an adapter's removal, done to the base model's own files: what a job writes as `model/`, but for what a
job cuts off there. Layers, heads and neurons that are gone stand as zeros here: an adapter does not tell them from
other changes.

Neither model is built: a weight W becomes `W + B A`, computed in float32 or wider and rounded once, everything else is
copied byte for byte. In 32 and 64 bits that is the job's own `model/`, to the bit on the machine that made it. In 16
bits the adapter's factors were rounded when they were written, and `model/` was made from unrounded ones: entries may
be neighbouring numbers.

An adapter of ours proves which model it is of. A component that it removes is one of the weight's own: `W a = -b`
where its direction a is of unit length, `b^T W = -a` where b is; a column that it takes to zero is the weight's without
the components. Of another weight, of a fine-tuned sister say, neither
holds, though all shapes agree.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from service import models
from service.errors import InvalidInput
from service.jobs import MODEL_ID
from service.settings import Settings
from service.weights import weight_files
from workers.shards import copy_files, write_shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Of the length of `W a + b` over what it is for a random direction. Another model's is about 1; rounding's is under a
# hundredth of these.
TOLERANCE = 0.01
TOLERANCE_16_BIT = 0.2


@dataclass(frozen=True, eq=False)
class Factors:
    """A module's part of an adapter: A (j, in) and B (out, j), as stored."""

    A: Tensor
    B: Tensor

    def merged(self, W: Tensor) -> Tensor:
        """W (out, in) with the adapter in it, in W's dtype."""
        wide = torch.float64 if W.dtype == torch.float64 else torch.float32
        return torch.addmm(W.to(wide), self.B.to(wide), self.A.to(wide)).to(W.dtype)

    def strangeness(self, W: Tensor) -> float:
        """How little the factors are components of W (out, in): 0 for its own, about 1 for another weight's."""
        W, A, B = W.double(), self.A.double(), self.B.double()
        if not B.count_nonzero() or _is_identity(A) or _is_identity(B):
            return 0.0  # of nothing, or of more components than there are ranks: their sum alone is stored
        zeroing = _is_one_hot(A) | _is_one_hot(B.T)
        left = torch.addmm(W, B[:, ~zeroing], A[~zeroing])
        scale = torch.linalg.vector_norm(W)
        return max(_strange(W, A[~zeroing], B[:, ~zeroing]), _strange(left, A[zeroing], B[:, zeroing])) / float(scale)


def _strange(W: Tensor, A: Tensor, B: Tensor) -> float:
    if not A.numel():
        return 0.0
    # A row block's component knows nothing of the other rows, where b is zero; a tile of the other columns nothing.
    by_a = torch.where(B != 0, W @ A.T + B, 0).norm(dim=0) * W.shape[1] ** 0.5
    by_b = torch.where(A != 0, B.T @ W + A, 0).norm(dim=1) * W.shape[0] ** 0.5
    return float(torch.minimum(by_a, by_b).max())


def _is_one_hot(rows: Tensor) -> Tensor:
    """(r,) which rows are of the identity: what they stand beside takes columns, or rows, of a weight to zero."""
    return (rows.count_nonzero(1) == 1) & (rows.sum(1) == 1)


def _is_identity(factor: Tensor) -> bool:
    rows, columns = factor.shape
    return rows == columns and torch.equal(factor, torch.eye(rows, dtype=factor.dtype))


def run(adapter: Path, base: str, out: Path, settings: Settings) -> None:
    """Write the base model with the adapter in it to `out`: whole, or not at all.

    Args:
        adapter: its folder, the folder that `c2i download` makes, or an adapter.zip.
        base: an installed model's ID, or a folder.

    Raises:
        InvalidInput: naming what is wrong, or what does not fit.
    """
    if out.exists():
        raise InvalidInput(f"{out} exists already; name a new folder", param="--out")
    model = _resolve(base, settings)
    config, tensors = _read_adapter(adapter)
    factors = _factors(config, tensors)
    places = _places(factors, model)
    transposed = bool(config.get("fan_in_fan_out"))
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        copy_files(model.folder, staging)
        for shard in weight_files(model.folder):
            _merge_shard(shard, staging, {key: factors[name] for key, name in places.items()}, transposed, config)
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"Merged {len(factors)} modules into {model.id}: {out}")


def _merge_shard(
    shard: Path, folder: Path, factors: Mapping[str, Factors], transposed: bool, config: Mapping[str, Any]
) -> None:
    made_from = config.get("base_model_name_or_path") or "a model of unknown name"
    changed: dict[str, Tensor] = {}
    with safe_open(shard, framework="pt") as opened:
        for key in sorted(factors.keys() & set(opened.keys())):
            stored, part = opened.get_tensor(key), factors[key]
            turned = transposed or stored.shape != (part.B.shape[0], part.A.shape[1])
            W = stored.T if turned else stored
            limit = TOLERANCE if W.dtype in (torch.float32, torch.float64) else TOLERANCE_16_BIT
            if not part.strangeness(W) <= limit:
                raise InvalidInput(
                    f"the adapter removes what {key} does not have: it was made from {made_from}, and this is another "
                    "model, or one that has it merged in already",
                    param="--base",
                )
            if part.B.count_nonzero():
                new = part.merged(W)
                changed[key] = new.T if turned else new
    write_shard(shard, folder, changed)


def _resolve(base: str, settings: Settings) -> models.Model:
    """An installed model goes before a folder of the same name."""
    installed = MODEL_ID.fullmatch(base) and (settings.models / base / "config.json").is_file()
    folder = Path(base).absolute()
    if not installed and (folder / "config.json").is_file():
        return models.read_folder(folder)
    if not MODEL_ID.fullmatch(base):
        raise InvalidInput(f"{base} is neither an installed model's ID nor a folder with a config.json", param="--base")
    return models.resolve(settings.models, base)


def _read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of an adapter, from a folder or an archive."""
    try:
        config, weights = _from_archive(path) if path.is_file() else _from_folder(path)
        parsed = json.loads(config)
        if not isinstance(parsed, dict):
            raise InvalidInput(f"its {CONFIG} holds no object", param="ADAPTER")
        return parsed, load_tensors(weights)
    except OSError as error:
        raise InvalidInput(
            f"{path}: {error.strerror}; a folder with {CONFIG} or an adapter.zip is wanted", param="ADAPTER"
        ) from None
    except (zipfile.BadZipFile, KeyError):
        raise InvalidInput(f"{path} is no zip that holds an adapter", param="ADAPTER") from None
    except (ValueError, SafetensorError):
        raise InvalidInput(f"{path} holds an adapter that is damaged; download it again", param="ADAPTER") from None


def _from_folder(path: Path) -> tuple[bytes, bytes]:
    folder = path if (path / CONFIG).is_file() else path / "adapter"
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def _from_archive(path: Path) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(path) as archive:
        inside = {PurePosixPath(name).name: name for name in archive.namelist()}
        return archive.read(inside[CONFIG]), archive.read(inside[WEIGHTS])


def _factors(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Each module's factors; an adapter that says more than `W + B A` is refused."""
    names = {key.removeprefix(PREFIX).removesuffix(A_SUFFIX) for key in tensors if key.endswith(A_SUFFIX)}
    known = {f"{PREFIX}{name}{suffix}" for name in names for suffix in (A_SUFFIX, B_SUFFIX)}
    plain = config.get("peft_type") == "LORA" and not any(config.get(key) for key in ("use_dora", "use_rslora"))
    if not names or known != tensors.keys() or not plain:
        raise InvalidInput("it is no plain LoRA, as c2i writes them; merge it with PEFT", param="ADAPTER")
    found = {
        name: Factors(*(tensors[f"{PREFIX}{name}{end}"] for end in (A_SUFFIX, B_SUFFIX))) for name in sorted(names)
    }
    for name, part in found.items():
        alpha = (config.get("alpha_pattern") or {}).get(name, config.get("lora_alpha"))
        rank = part.A.shape[0]
        if part.A.ndim != 2 or part.B.ndim != 2 or part.B.shape[1] != rank or alpha != rank:
            raise InvalidInput(f"{name} has another scaling than 1; merge it with PEFT", param="ADAPTER")
    return found


def _places(factors: Mapping[str, Factors], model: models.Model) -> dict[str, str]:
    """For each tensor that changes its module. A checkpoint may leave out the model's prefix or have one more."""
    places: dict[str, str] = {}
    for name, part in factors.items():
        wanted = f"{name}.weight"
        keys = [key for key in model.shapes if f".{wanted}".endswith(f".{key}") or key.endswith(f".{wanted}")]
        shape = (part.B.shape[0], part.A.shape[1])
        if len(keys) != 1 or model.shapes[keys[0]] not in (shape, shape[::-1]):
            has = " x ".join(map(str, model.shapes[keys[0]])) if len(keys) == 1 else "no such weight"
            raise InvalidInput(
                f"the adapter does not fit: its {wanted} is {shape[0]} x {shape[1]}, and the model has {has}",
                param="--base",
            )
        places[keys[0]] = name
    return places

"""Which tensors a model's weights hold, from the headers of its safetensors files alone.

The format: https://huggingface.co/docs/safetensors. A header is believed where its tensors fill the file to the last
byte without a gap or an overlap.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import UnusableModel
from service.model_files import MAX_LISTING_BYTES, parse_json, read_json, shown, unusable

# Of all headers of a model together: one of 100,000 tensors has 12 MB. The format's own limit is 100 MB a file, which
# would be a gigabyte once decoded.
MAX_HEADER_BYTES = 32 * 2**20
MAX_DIMENSIONS = 8
# Bits of a number, by the format's names.
BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
# What weights come as that run code when they are loaded.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint."""

    dtype: str
    """By the format's name: `BF16`."""
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded, all of them present: `model.safetensors`, else the shards of its index.

    Raises:
        UnusableModel: only pickles, a missing shard, or no weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise unusable("it has a model.safetensors and an index of shards too; remove the one that is not meant")
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise unusable(
            "it has only pickle weights, which can run code when they are loaded. Convert them to safetensors: "
            "load the model where you trust it and call `save_pretrained`."
        )
    raise unusable("it has no weights; there should be a model.safetensors, or an index of its shards")


def _weight_map(index: Path) -> dict[str, str]:
    """Each tensor's shard, by the index."""
    weight_map = read_json(index, MAX_LISTING_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise unusable(f"its {index.name} names no shards")
    for name in set(map(str, weight_map.values())):
        if not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name, re.ASCII):
            raise unusable(f"its {index.name} names a shard that is not a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise unusable(f"its shard {name} is missing; download the model again")
    return weight_map


@dataclass(frozen=True)
class Weights:
    """What the headers of a model's weights say."""

    tensors: dict[str, Tensor]
    headers: dict[str, bytes]
    """By file, as they stand there."""


def read_weights(folder: Path) -> Weights:
    """Every tensor of a model, from the headers of its files.

    Raises:
        UnusableModel: a file is cut off or lies about what it holds, or the index and the shards disagree.
    """
    headers: dict[str, bytes] = {}
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for path in weight_files(folder):
        headers[path.name] = _read_header(path, MAX_HEADER_BYTES - sum(map(len, headers.values())))
        for name, tensor in _tensors(path, headers[path.name]).items():
            if name in tensors:
                raise unusable(f"two of its shards hold {shown(name)}")
            tensors[name], shards[name] = tensor, path.name
    if not tensors:
        raise unusable("its weights hold no tensor")
    if "model.safetensors" not in headers:
        told = _weight_map(folder / "model.safetensors.index.json")
        wrong = sorted(name for name in told.keys() | shards.keys() if told.get(name) != shards.get(name))
        if wrong:
            raise unusable(
                f"its model.safetensors.index.json and its shards disagree about {len(wrong):,} tensors, "
                f"{shown(wrong[0])} first; download the model again"
            )
    return Weights(tensors, headers)


def _read_header(path: Path, limit: int) -> bytes:
    """The JSON header of a safetensors file: eight bytes of its length, then itself."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise _broken(path, f"its header would have {length:,} bytes and the file has {size:,}")
            if length > limit:
                raise unusable(
                    f"the header of its {path.name} has {length:,} bytes; a model's may have {MAX_HEADER_BYTES:,} "
                    "together"
                )
            return file.read(length)
    except OSError as error:
        raise unusable(f"its {shown(path.name)} cannot be read ({type(error).__name__})") from None


def _tensors(path: Path, header: bytes) -> dict[str, Tensor]:
    """The tensors of a file, which fill it without a gap or an overlap."""
    entries = parse_json(header, f"header of {path.name}")
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        dtype, shape, begin, end = _described(path, name, entry)
        bits = math.prod(shape) * BITS[dtype]
        if (end - begin) * 8 != bits:
            raise _broken(path, f"{shown(name)} would take {bits // 8:,} bytes and has {end - begin:,}")
        spans.append((begin, end, name))
        tensors[name] = Tensor(dtype, shape)
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise _broken(path, f"{shown(name)} does not begin where the tensor before it ends")
        reached = end
    size = path.stat().st_size
    if size != 8 + len(header) + reached:
        raise _broken(path, f"the file has {size:,} bytes and its header tells of {8 + len(header) + reached:,}")
    return tensors


def _described(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's dtype, shape and place, if these are what they should be."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in BITS:
                raise _broken(path, f"{shown(name)} is of an unknown type")
            if len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in shape):
                return dtype, tuple(shape), begin, end
    raise _broken(path, f"{shown(name)} has no type, shape and place")


def _broken(path: Path, what: str) -> UnusableModel:
    return unusable(f"its {path.name} is not a whole safetensors file ({what}); download the model again")

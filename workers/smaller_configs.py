"""The config.json of a smaller model, and whether transformers makes of it what is meant.

Each architecture has its own names for its numbers and its own rules for what a layer is: a list with an entry for
each, a pattern by the layer's index, nothing. So no table says what can be smaller: a config is changed, the
architecture built from it without memory, and every block compared with the one of the base that it is to be.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from workers.cuts import Cut
from workers.loading import skeleton
from workers.targets import decoder_blocks

# Lists with an entry for each layer, by their names: other lists may happen to be as long.
PER_LAYER = re.compile(r"layer|block|pattern|attention_types")
WIDTHS = ("intermediate_size", "shared_expert_intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")
HEADS, GROUPS, HEAD = "num_attention_heads", "num_key_value_heads", "head_dim"
# What a block may know of its place, and of nothing else.
PLACES = {"layer_idx", "layer_id", "layer_index"}
Json = dict[str, Any]


class Misfit(Exception):
    """Transformers makes something else of a config than what is meant; the message says what."""


class SmallerConfig:
    """The config of a base model, and smaller ones made from it."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the base model's.
        """
        self.text = (folder / "config.json").read_text()
        self.base = skeleton(folder)
        self._shapes = _shapes(self.base)
        self._known: dict[tuple[object, ...], str | Misfit] = {}

    def fitting(self, cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The text of the smaller model's config.json.

        Args:
            shapes: of what is sliced, by the parameters' names in the base.

        Raises:
            Misfit: if transformers does not build from any config what the cut leaves.
        """
        key = (cut.layers, *cut.widths)
        if key not in self._known:
            self._known[key] = self._try_all(cut, shapes)
        found = self._known[key]
        if isinstance(found, Misfit):
            raise found
        return found

    def _try_all(self, cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> str | Misfit:
        misfit = Misfit("its config.json has no name for the number of its neurons")
        for width in self._names_of_width() if cut.neurons else [None]:
            text = self._changed(cut, width)
            try:
                self._compare(_built(text), cut, shapes)
            except Misfit as found:
                misfit = found
            else:
                return text
        return misfit

    def _names_of_width(self) -> list[str]:
        """The keys that may hold the number of neurons, the likeliest first: those that are set to it, those unset."""
        config: Any = self.base.config
        config = config.get_text_config()
        names = [self._named(name) for name in WIDTHS]
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return sorted(values, key=lambda name: values[name] is None)

    def _named(self, name: str) -> str:
        """What the architecture calls a key."""
        config: Any = self.base.config
        known: Mapping[str, str] = type(config.get_text_config()).attribute_map
        return known.get(name, name)

    def _changed(self, cut: Cut, width: str | None) -> str:
        """The text with what must change in it, in the order and the form that it has."""
        config: Any = self.base.config
        model = config.get_text_config()
        whole: Json = json.loads(self.text)
        nested = whole.get("text_config") if model is not config else None
        part: Json = nested if isinstance(nested, dict) else whole
        in_order = list(part) == sorted(part)
        count = getattr(model, "num_hidden_layers", None)
        if len(cut.layers) != count and count == len(decoder_blocks(self.base)[1]):
            part[self._named("num_hidden_layers")] = len(cut.layers)
            for key, kept in _cut_lists(model, cut.layers).items():
                part[key] = kept
        neurons, heads, groups = cut.widths
        if width is not None:
            part[width] = neurons
        if heads is not None:
            part[self._named(HEADS)] = heads
            if hasattr(model, GROUPS):
                part[self._named(GROUPS)] = groups
            if getattr(model, HEAD, None) is None or HEAD not in part:
                part[HEAD] = getattr(model, HEAD, None) or model.hidden_size // model.num_attention_heads
        if in_order:
            ordered = {key: part[key] for key in sorted(part)}
            part.clear()
            part.update(ordered)
        indent = re.search(r"^\{\n( +|\t+)", self.text)
        end = "\n" if self.text.endswith("\n") else ""
        return json.dumps(whole, indent=indent[1] if indent else None, ensure_ascii=self.text.isascii()) + end

    def _compare(self, made: nn.Module, cut: Cut, shapes: Mapping[str, tuple[int, ...]]) -> None:
        prefix, blocks = decoder_blocks(self.base)
        _, kept = decoder_blocks(made)
        if len(kept) != len(cut.layers):
            raise Misfit("the number of its layers is not in its config.json")
        names = _renamed(prefix, cut.layers)
        expected = {new: shapes.get(name, shape) for name, shape in self._shapes.items() if (new := names(name))}
        found = _shapes(made)
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise Misfit(f"its {wrong[0]} would have another shape")
        changed = self._changed_numbers(cut)
        for block, layer in zip(kept, cut.layers, strict=True):
            difference = _difference(blocks[layer], block, changed)
            if difference:
                raise Misfit(f"what its layer {layer} is depends on its place: {difference}")

    def _changed_numbers(self, cut: Cut) -> set[tuple[int, int]]:
        """Pairs of a number of the base's modules and one of the smaller model's that mean the same."""
        config: Any = self.base.config
        config = config.get_text_config()
        H = getattr(config, HEADS, None) or 0
        K = getattr(config, GROUPS, None) or H
        _, heads, groups = cut.widths
        pairs: set[tuple[int, int]] = set()
        if heads and groups:
            d = getattr(config, HEAD, None) or config.hidden_size // H
            pairs = {(H, heads), (K, groups), (H // K, heads // groups), (H * d, heads * d), (K * d, groups * d)}
        if cut.neurons:
            n = len(next(iter(cut.neurons.values())))
            pairs |= {(size, n) for name in WIDTHS if isinstance(size := getattr(config, name, None), int)}
        return pairs


def _cut_lists(model: Any, layers: Sequence[int]) -> Json:
    """The lists of a config that have an entry for each layer, without those of the layers that go."""
    count = model.num_hidden_layers
    lists = {
        key: [value[layer] for layer in layers]
        for key, value in model.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == count and PER_LAYER.search(key)
    }
    if hasattr(model, "attention_types"):  # GPT-Neo's: [[types, how often], ...], of which `attention_layers` comes
        lists["attention_types"] = [[[model.attention_layers[layer] for layer in layers], 1]]
    return lists


def _renamed(prefix: str, layers: Sequence[int]) -> Callable[[str], str | None]:
    """From a name in the base to the same in the model of these layers alone; None for what is in none of them."""
    places = {layer: place for place, layer in enumerate(layers)}

    def rename(name: str) -> str | None:
        if not name.startswith(f"{prefix}."):
            return name
        index, dot, rest = name.removeprefix(f"{prefix}.").partition(".")
        place = places.get(int(index)) if index.isdigit() else None
        return None if place is None else f"{prefix}.{place}{dot}{rest}"

    return rename


def _built(text: str) -> nn.Module:
    """The architecture of a config.json, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(text)
        try:
            return skeleton(Path(folder))
        except Exception as error:  # each architecture has errors of its own for what it does not take
            raise Misfit(f"transformers does not take it ({' '.join(str(error).split())[-160:]})") from None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters and buffers."""
    return {name: tuple(t.shape) for named in (model.named_parameters(), model.named_buffers()) for name, t in named}


def _difference(old: nn.Module, new: nn.Module, changed: set[tuple[int, int]]) -> str | None:
    """Where two blocks differ in anything but their weights' sizes and their place."""
    olds, news = (dict(block.named_modules()) for block in (old, new))
    if olds.keys() != news.keys():
        return f"it would hold {sorted(olds.keys() ^ news.keys())[0]} or not"
    for name, module in olds.items():
        other = news[name]
        if type(module) is not type(other):
            return f"its {name} would be {type(other).__name__}, not {type(module).__name__}"
        if any(True for _ in module.parameters(recurse=False)):
            continue
        before, after = _plain(module), _plain(other)
        for key in sorted(before.keys() | after.keys()):
            pair = (before.get(key), after.get(key))
            if pair[0] != pair[1] and pair not in changed:
                return f"the {key} of its {name or 'block'} would be {pair[1]}, not {pair[0]}"
    return None


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in PLACES and not key.startswith("_") and isinstance(value, bool | int | float | str | type(None))
    }

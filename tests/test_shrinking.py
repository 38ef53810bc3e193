"""A smaller checkpoint: loaded by stock transformers, equal to the model in memory, counted to the number."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from service.reports import Shipped
from service.weights import read_weights
from tests import tiny
from workers import checkpoints
from workers.branches import find_branches
from workers.checkpoints import write_model
from workers.cuts import useless
from workers.loading import Checkpoint, load
from workers.pruning import applied
from workers.ranking import Plan
from workers.shrinking import examine, parameters_left
from workers.spectrum import decompose
from workers.structures import Kind, Unit, find_units, tile_units
from workers.targets import find_targets

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = [*tiny.ARCHITECTURES, *tiny.MIXTURES, *tiny.MASKED]
LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "gpt_neo": "num_layers", "distilbert": "n_layers"}
# A norm behind the sum stays, or what is in the block is not all known, or its layers are one that is shared.
WHOLE = {*tiny.MASKED, *tiny.MIXTURES} - {"modernbert"}
# Heads are as wide as the hidden size over their number, or take part in an embedding of distances.
HEADS_STAY = {"gpt2", "gptj", "gpt_neox", "gpt_neo", *tiny.MASKED}
NEURONS_STAY = {"mixtral", "qwen2_moe", "mobilebert"}
TOKENS = torch.tensor([[11, 42, 97, 5, 103, 18, 64, 7]])


def built(architecture: str, folder: Path, **shape: Any) -> Path:
    """A tiny model of five layers."""
    shape = {LAYERS.get(architecture, "num_hidden_layers"): 5, **shape}
    if architecture == "gpt_neo":
        shape["attention_types"] = [[["global", "local"], 2], [["local"], 1]]
    return tiny.build(architecture, folder, shape=shape)


def stock(folder: Path) -> Any:
    """As anyone would load it."""
    masked = "MaskedLM" in (folder / "config.json").read_text()
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


class Written:
    """A plan of structures and what was written of it."""

    def __init__(self, base: Path, out: Path, kinds: Collection[Kind], pick: Callable[[Unit], tuple[int, ...]]) -> None:
        self.base: Checkpoint = load(base)
        self.targets, _ = find_targets(self.base.model)
        self.units, _ = find_units(self.base.model, self.targets, kinds)
        structures = {unit.name: found for unit in self.units if (found := pick(unit))}
        first = self.targets[0]
        self.plan = Plan({first.name: (1, 2), self.targets[-1].name: (0,)}, structures)
        self.spectra = {t.name: decompose(t.weight) for t in (first, self.targets[-1])}
        self.folder = out
        self.shipped: Shipped = write_model(out, self.base, self.targets, self.spectra, self.plan, self.units)

    def in_memory(self) -> Tensor:
        with applied(self.targets, self.spectra, self.plan, self.units):
            return logits(self.base.model)

    def check(self) -> Any:
        """That it is the model in memory, and as large as it is said to be; the model."""
        model: nn.Module = stock(self.folder)
        torch.testing.assert_close(logits(model), self.in_memory(), rtol=0, atol=1e-4)
        assert not torch.allclose(logits(self.base.model), self.in_memory(), rtol=0, atol=1e-3)
        count = sum(p.numel() for p in model.parameters())
        assert self.shipped.parameters == count == parameters_left(examine(self.base), self.plan, self.units)
        assert self.shipped.bytes == (self.folder / "model.safetensors").stat().st_size
        assert Shipped.model_validate_json((self.folder / "manifest.json").read_text()) == self.shipped
        return model


def everything(unit: Unit) -> tuple[int, ...]:
    """The first, a middle and the last layer; uneven neurons and groups elsewhere, as many in every layer and one more
    in one."""
    if unit.kind == Kind.LAYERS:
        return (0,) if unit.layer in (0, 2, 4) else ()
    if unit.kind == Kind.GROUPS:
        return tuple(range(unit.layer % 2, unit.layer % 2 + unit.count // 2))
    return tuple(range(unit.layer, unit.layer + 8 + (unit.layer == 1)))


@pytest.mark.parametrize("architecture", EVERY)
def test_layers_neurons_and_heads_are_cut_off_or_a_reason_is_given(architecture: str, tmp_path: Path) -> None:
    base = built(architecture, tmp_path / "base")
    written = Written(base, tmp_path / "model", (Kind.LAYERS, Kind.NEURONS, Kind.GROUPS), everything)
    model, shipped = written.check(), written.shipped
    zeros = " ".join(each.what for each in shipped.zeros)
    if architecture == "albert":  # one block is called again and again: all of it is gone
        assert (zeros, shipped.gone) == ("layer 0", ["47 of 48 neurons of every MLP"])
        return
    kept = [0, 1, 3] if architecture == "modernbert" else [1, 3]  # its first layer has a norm less
    assert shipped.layers == (None if architecture in WHOLE else kept)
    assert ("layer" in zeros) or architecture in tiny.MIXTURES
    assert ("query head" in zeros) == (architecture in HEADS_STAY)
    gone = " ".join(shipped.gone)
    assert ("neurons of every MLP" in gone) == (architecture not in NEURONS_STAY - {"qwen2_moe"})
    assert ("query heads of every attention" in gone) == (architecture not in HEADS_STAY)
    assert all(each.why for each in shipped.zeros)
    if shipped.gone:
        assert shipped.parameters < sum(p.numel() for p in written.base.model.parameters())
    if architecture not in tiny.MASKED:
        # A cache has a place for each layer that is left: what is generated with one is what is without.
        with_cache, without = (
            model.generate(
                TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=cached
            )
            for cached in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_what_a_layer_is_by_its_place_stays_at_its_place(tmp_path: Path) -> None:
    """GPT-2's scale may be divided by the layer's number: without the first all others would be scaled otherwise."""
    base = built("gpt2", tmp_path / "base", scale_attn_by_inverse_layer_idx=True)
    written = Written(base, tmp_path / "model", (Kind.LAYERS,), lambda unit: (0,) if unit.layer in (1, 4) else ())
    written.check()
    assert written.shipped.gone == ["layer 4"]  # behind it there is none
    (zeros,) = written.shipped.zeros
    assert zeros.what == "layer 1"
    assert "the scaling of its attn would be" in zeros.why


def test_what_is_smaller_and_predicts_otherwise_is_not_written(tmp_path: Path) -> None:
    base = built("llama", tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "TOLERANCE", {torch.float32: -1.0})
        written = Written(base, tmp_path / "model", (Kind.LAYERS, Kind.NEURONS), everything)
    assert written.shipped.layers is None
    assert {each.why.partition(":")[0] for each in written.shipped.zeros} == {"what is smaller predicts otherwise"}
    assert (tmp_path / "model" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert read_weights(tmp_path / "model").tensors == read_weights(base).tensors
    torch.testing.assert_close(logits(stock(written.folder)), written.in_memory(), rtol=0, atol=1e-4)


def test_of_shared_keys_and_values_query_heads_go_alone_where_each_group_can_spare_as_many(tmp_path: Path) -> None:
    base = built("qwen3", tmp_path / "base", num_attention_heads=8)

    def pick(unit: Unit) -> tuple[int, ...]:
        return (unit.layer % 4, 4 + unit.layer % 3) if unit.layer else (1, 2, 6, 7)

    written = Written(base, tmp_path / "model", (Kind.HEADS,), pick)
    written.check()
    # Three heads a group are left: a hidden size of 32 is a multiple of no six, and Qwen3 asks for none.
    assert written.shipped.gone == ["2 of 8 query heads of every attention"]
    assert [each.what for each in written.shipped.zeros] == ["2 query heads in layer 0"]


def test_a_number_of_heads_that_the_architecture_does_not_take_is_not_asked_of_it(tmp_path: Path) -> None:
    base = built("llama", tmp_path / "base", num_attention_heads=4, num_key_value_heads=4)
    written = Written(base, tmp_path / "model", (Kind.GROUPS,), lambda unit: (1, 2, 3)[: 2 if unit.layer else 3])
    written.check()
    assert written.shipped.gone == ["2 of 4 query heads of every attention"]
    base = built("llama", tmp_path / "other", num_attention_heads=4, num_key_value_heads=4)
    written = Written(base, tmp_path / "smaller", (Kind.GROUPS,), lambda unit: (unit.layer % 4,))
    written.check()
    assert written.shipped.gone == []
    assert "not a multiple of the number of attention heads" in written.shipped.zeros[0].why


def test_a_config_keeps_its_order_and_form_and_changes_in_nothing_else(tmp_path: Path) -> None:
    base = built("gemma2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    shuffled = dict(sorted(config.items(), key=lambda item: item[0][::-1]))
    (base / "config.json").write_text(json.dumps(shuffled, indent=4))
    Written(base, tmp_path / "model", (Kind.LAYERS,), lambda unit: (0,) if unit.layer in (0, 3) else ()).check()
    expected = shuffled | {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }
    assert (tmp_path / "model" / "config.json").read_text() == json.dumps(expected, indent=4)


@pytest.mark.parametrize("prefix", [True, False])
def test_shards_keep_their_names_and_their_index_is_true(prefix: bool, tmp_path: Path) -> None:
    base = built("gpt2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    inner: Any = model if prefix else model.transformer
    inner.save_pretrained(base, max_shard_size="40KB")
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(config))
    out = tmp_path / "model"
    written = Written(base, out, (Kind.LAYERS, Kind.NEURONS), everything)
    torch.testing.assert_close(logits(stock(out)), written.in_memory(), rtol=0, atol=1e-4)
    assert written.shipped.layers == [1, 3]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) < {path.name for path in base.glob("*.safetensors")}
    read_weights(out)  # refuses an index that its shards do not bear out
    size = 0
    for name in files:
        with safe_open(out / name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            size += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118 - no mapping
    assert index["metadata"]["total_size"] == size
    assert written.shipped.bytes == sum((out / name).stat().st_size for name in files)
    assert written.shipped.parameters == sum(p.numel() for p in stock(out).parameters())


def test_sub_layers_and_tiles_stand_as_zeros(tmp_path: Path) -> None:
    base = built("llama", tmp_path / "base")
    written = Written(
        base,
        tmp_path / "model",
        (Kind.ATTENTION, Kind.MLP),
        lambda unit: (0,) if unit.layer == 3 or (unit.layer == 1 and unit.kind == Kind.MLP) else (),
    )
    written.check()
    assert written.shipped.layers == [0, 1, 2, 4]  # both of its sub-layers are gone
    assert [each.what for each in written.shipped.zeros] == ["the mlp of layer 1"]
    tiles = tile_units(written.targets, 16)
    plan = Plan({}, {tiles[0].name: (0, 1), tiles[5].name: (2,)})
    shipped = write_model(tmp_path / "tiles", written.base, [], {}, plan, tiles)
    assert [each.what for each in shipped.zeros] == ["3 of blocks16 in 2 weights"]
    assert shipped.gone == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_what_lies_in_two_structures_is_counted_once(architecture: str, tmp_path: Path) -> None:
    base = load(built(architecture, tmp_path / "base"))
    targets, _ = find_targets(base.model)
    branches, _ = find_branches(base.model, targets)
    units = [*find_units(base.model, targets, set(Kind))[0], *tile_units(targets, 8)]
    of = {unit.name: unit for unit in units}
    layer = next(u for u in units if u.kind == Kind.LAYERS and u.layer == 2)
    inside = {u.name: (0,) for u in units if u.layer == 2}
    assert useless(Plan({}, inside), units, branches) == int(layer.sizes.sum())
    groups = next(u for u in units if u.kind == Kind.GROUPS and u.layer == 0)
    heads = next(u for u in units if u.kind == Kind.HEADS and u.layer == 0)
    each = heads.count // groups.count
    both = Plan({}, {groups.name: (0,), heads.name: tuple(range(each))})
    assert useless(both, units, branches) == int(groups.sizes[0])
    assert useless(Plan({}, {heads.name: tuple(range(each))}), units, branches) == int(groups.sizes[0])
    neurons = next(u for u in units if u.kind == Kind.NEURONS and u.layer == 1)
    assert useless(Plan({}, {neurons.name: (3, 9)}), units, branches) == 2 * int(neurons.sizes[0])
    tile = next(u for u in units if u.kind == "blocks8" and u.layer == 1)
    alone = Plan({}, {tile.name: (0, 3)})
    assert useless(alone, units, branches) == int(of[tile.name].sizes[[0, 3]].sum())

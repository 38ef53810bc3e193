"""Evaluation from a later block against evaluation of the whole model, on every architecture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from service.jobs import Objective
from tests import tiny
from tests.plain import ARCHITECTURES, MIXTURES, encoded, loaded, within_window
from workers.evaluation import Outcome, evaluate
from workers.examples import Encoded, Layout, batches
from workers.prefixes import Prefixes
from workers.pruning import applied
from workers.ranking import Plan
from workers.spectrum import decompose
from workers.targets import decoder_blocks, find_targets

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH = 4
# Several batches of several rows.
PACKED, FLAT = Layout(packed=True, tokens=32), Layout(packed=False, tokens=32)
BOTH = Objective.BOTH
# Gemma 3n's last two blocks attend to the keys and values of the two before.
SHARING: tuple[str, dict[str, Any]] = (
    "gemma3n_text",
    {
        **tiny._rotary(head_dim=8, sliding_window=32),
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": 320,
        "activation_sparsity_pattern": [0.0] * DEPTH,
    },
)


def deeper(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config of `DEPTH` blocks."""
    found = {key: DEPTH if key in ("num_hidden_layers", "n_layer", "num_layers") else v for key, v in keys.items()}
    if "attention_types" in found:
        found["attention_types"] = [[["global", "local"], DEPTH // tiny.LAYERS]]
    return found


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`deep_models("llama")` is the folder of a tiny model of four blocks."""
    built: dict[str, Path] = {}

    def model(architecture: str) -> Path:
        if architecture not in built:
            model_type, keys = (tiny.ARCHITECTURES | tiny.MIXTURES | {"gemma3n": SHARING})[architecture]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny, "MIXTURES", {architecture: (model_type, deeper(keys))})  # goes before the others
                built[architecture] = tiny.build(architecture, tmp_path_factory.mktemp("deep") / architecture)
        return built[architecture]

    return model


@contextmanager
def block_pruned(model: nn.Module, block: int) -> Iterator[list[str]]:
    """The model without the first component of all matrices of a block; their names."""
    name, _ = decoder_blocks(model)
    targets = [t for t in find_targets(model)[0] if t.name.startswith(f"{name}.{block}.")]
    spectra = {t.name: decompose(t.weight) for t in targets}
    with applied(targets, spectra, Plan({t.name: (0,) for t in targets})):
        yield list(spectra)


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[int]]:
    """How often each block has truly run: calls of the first target in it."""
    name, _ = decoder_blocks(model)
    calls: Counter[int] = Counter()
    handles = []
    for block in range(DEPTH):
        first = next(t for t in find_targets(model)[0] if t.name.startswith(f"{name}.{block}."))
        handles.append(first.module.register_forward_pre_hook(lambda *_, block=block: calls.update([block])))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def assert_same(found: Outcome, expected: Outcome) -> None:
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
    for field in ("exact", "predicted", "correct"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))


def rows(folder: Path, layout: Layout) -> list[Encoded]:
    """Examples that fill several batches."""
    found = within_window(folder, encoded(folder)) if layout.packed else encoded(folder)
    assert len(list(batches(found, layout))) > 1
    return found


@pytest.mark.parametrize("layout", [PACKED, FLAT], ids=["packed", "flat"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_a_plan_fares_the_same_from_the_first_block_that_it_touches(
    architecture: str, layout: Layout, deep_models: Callable[[str], Path]
) -> None:
    folder = deep_models(architecture)
    model, examples = loaded(folder).model, rows(folder, layout)
    prefixes = Prefixes(model, examples, layout)
    assert prefixes.reusable
    base = prefixes.record(BOTH)
    np.testing.assert_array_equal(base.loss, evaluate(model, examples, BOTH, layout).loss)
    for block in (0, 2, 3):
        with block_pruned(model, block) as names:
            assert prefixes.first_block(names) == block
            expected = evaluate(model, examples, BOTH, layout)
            assert abs(expected.loss - base.loss).max() > 1e-3
            with counted(model) as calls:
                found = prefixes.evaluate(BOTH, block)
            assert calls == dict.fromkeys(range(block, DEPTH), len(list(batches(examples, layout))))
            assert_same(found, expected)
            if block == 0:
                np.testing.assert_array_equal(found.loss, expected.loss)
    assert_same(prefixes.evaluate(BOTH, DEPTH - 1), base)


def test_recording_again_follows_an_accepted_plan(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("llama")
    model, examples = loaded(folder).model, rows(folder, PACKED)
    prefixes = Prefixes(model, examples, PACKED)
    before = prefixes.record(BOTH)
    held = prefixes.held_bytes
    with block_pruned(model, 1):
        expected = evaluate(model, examples, BOTH, PACKED)
        assert_same(prefixes.evaluate(BOTH, 2), before)  # block 1's old output stands in: what the caller must not do
        assert_same(prefixes.record(BOTH), expected)
        assert_same(prefixes.evaluate(BOTH, 2), expected)
        assert prefixes.held_bytes == held


def test_without_a_record_everything_runs(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("gpt2")
    model, examples = loaded(folder).model, rows(folder, FLAT)
    with counted(model) as calls:
        found = Prefixes(model, examples, FLAT).evaluate(BOTH, 3)
    assert calls[0] >= len(list(batches(examples, FLAT)))
    np.testing.assert_array_equal(found.loss, evaluate(model, examples, BOTH, FLAT).loss)


# The outputs of three blocks are kept where there is room; gpt_neo's hold attention weights too.
@pytest.mark.parametrize(("share", "stride"), [(1.0, 1), (0.99, 2), (0.34, 2), (0.3, 4), (0.0, 4)])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_a_limit_thins_the_record_and_changes_no_result(
    architecture: str, share: float, stride: int, deep_models: Callable[[str], Path]
) -> None:
    folder = deep_models(architecture)
    model, examples = loaded(folder).model, rows(folder, FLAT)
    whole = Prefixes(model, examples, FLAT)
    whole.record(BOTH)
    if architecture == "llama":
        positions = sum(batch.input_ids.numel() for batch in batches(examples, FLAT))
        assert whole.held_bytes == positions * tiny.HIDDEN * 4 * (DEPTH - 1)
    prefixes = Prefixes(model, examples, FLAT, limit_bytes=int(share * whole.held_bytes))
    prefixes.record(BOTH)
    assert prefixes.stride == stride
    assert prefixes.held_bytes <= prefixes.limit_bytes
    assert (prefixes.held_bytes == 0) == (stride == DEPTH)
    with block_pruned(model, 3), counted(model) as calls:
        found = prefixes.evaluate(BOTH, 3)
        assert min(calls) == 3 // stride * stride
        assert_same(found, evaluate(model, examples, BOTH, FLAT))


def test_an_error_in_a_block_leaves_every_forward_as_it_was(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("qwen2")
    model, examples = loaded(folder).model, rows(folder, PACKED)
    _, blocks = decoder_blocks(model)
    prefixes = Prefixes(model, examples, PACKED)
    base = prefixes.record(BOTH)
    own = blocks[1].forward
    vars(blocks[1])["forward"] = own  # as a library leaves it that has wrapped a block

    def fail(*_: object) -> None:
        raise ValueError("out of order")

    handle = blocks[3].register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="out of order"):
            prefixes.evaluate(BOTH, 3)
        with pytest.raises(ValueError, match="out of order"):
            prefixes.record(BOTH)
    finally:
        handle.remove()
        still = vars(blocks[1]).pop("forward")
    assert still is own
    assert not any("forward" in vars(block) or block._forward_hooks for block in blocks)
    assert_same(evaluate(model, examples, BOTH, PACKED), base)


class Storing(nn.Module):
    """A block that leaves its output where a later one finds it."""

    def __init__(self, block: nn.Module, store: list[Tensor]) -> None:
        super().__init__()
        self.block, self.store = block, store

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        out: Tensor = self.block(hidden, *positional, **named)
        self.store[:] = [out.mean()]
        return out


class Reading(Storing):
    """A block that adds what an earlier one has left."""

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        out: Tensor = self.block(hidden, *positional, **named)
        return out + self.store[0]


class Overwriting(Storing):
    """A block that writes into its input, as fused kernels do."""

    def forward(self, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
        out: Tensor = self.block(hidden, *positional, **named)
        return hidden.copy_(out)


@contextmanager
def replaced(blocks: nn.ModuleList, changed: dict[int, nn.Module]) -> Iterator[None]:
    """Other modules in the place of some blocks."""
    before = list(blocks)
    for index, block in changed.items():
        blocks[index] = block
    try:
        yield
    finally:
        for index in changed:
            blocks[index] = before[index]


def run_in_full(model: nn.Module, examples: Sequence[Encoded]) -> None:
    """The model is seen not to be reusable, and evaluated as ever."""
    prefixes = Prefixes(model, examples, FLAT)
    assert not prefixes.reusable
    expected = evaluate(model, examples, BOTH, FLAT)
    np.testing.assert_array_equal(prefixes.record(BOTH).loss, expected.loss)
    assert prefixes.held_bytes == 0
    np.testing.assert_array_equal(prefixes.evaluate(BOTH, 3).loss, expected.loss)


@pytest.mark.parametrize(("writer", "reader"), [(0, 3), (0, 2), (1, 2), (2, 3)])
def test_a_model_whose_blocks_share_more_than_the_hidden_state_is_run_in_full(
    writer: int, reader: int, deep_models: Callable[[str], Path]
) -> None:
    folder = deep_models("llama")
    model, examples = loaded(folder).model, rows(folder, FLAT)
    _, blocks = decoder_blocks(model)
    store: list[Tensor] = []
    with replaced(blocks, {writer: Storing(blocks[writer], store), reader: Reading(blocks[reader], store)}):
        run_in_full(model, examples)


def test_a_model_that_runs_its_blocks_twice_is_run_in_full(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("llama")
    model, examples = loaded(folder).model, rows(folder, FLAT)
    _, blocks = decoder_blocks(model)
    with replaced(blocks, {3: blocks[0]}):
        run_in_full(model, examples)


def test_shared_keys_and_values_of_a_real_architecture_are_run_in_full(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("gemma3n")
    run_in_full(loaded(folder).model, rows(folder, FLAT))


def test_blocks_that_write_into_their_input_spoil_no_record(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("llama")
    model, examples = loaded(folder).model, rows(folder, FLAT)
    _, blocks = decoder_blocks(model)
    with replaced(blocks, {i: Overwriting(block, []) for i, block in enumerate(blocks)}):
        prefixes = Prefixes(model, examples, FLAT)
        assert prefixes.reusable
        base = prefixes.record(BOTH)
        for _ in range(2):
            assert_same(prefixes.evaluate(BOTH, 2), base)
    assert_same(evaluate(model, examples, BOTH, FLAT), base)


def test_the_first_block_is_the_least_of_those_touched(deep_models: Callable[[str], Path]) -> None:
    folder = deep_models("llama")
    prefixes = Prefixes(loaded(folder).model, [], FLAT)
    assert prefixes.first_block(["model.layers.3.mlp.up_proj[0:192]", "model.layers.2.self_attn.q_proj"]) == 2
    assert prefixes.first_block(["model.layers.3.mlp.up_proj", "model.layers.12.mlp.up_proj"]) == 3
    assert prefixes.first_block(["model.layers.3.mlp.up_proj", "lm_head"]) == 0
    assert prefixes.first_block([]) == DEPTH - 1


def test_an_empty_split_has_an_empty_outcome(deep_models: Callable[[str], Path]) -> None:
    prefixes = Prefixes(loaded(deep_models("llama")).model, [], FLAT)
    assert prefixes.record(BOTH).loss.shape == prefixes.evaluate(BOTH, 2).loss.shape == (0,)

"""A plan is applied and undone exactly, whatever was tried before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.plain import loaded, targets_of, weights_of
from workers.adapters import lora_factors, module_factors
from workers.pruning import applied, pruned
from workers.ranking import Plan
from workers.spectrum import Spectrum, decompose
from workers.targets import Target

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]
KINDS = [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gpt2", "bfloat16"), ("phi3", "float16")]


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal to the bit: NaN and the sign of zero count too."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)) for name in a
    )


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_a_plan_is_undone_to_the_bit(architecture: str, dtype: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture, dtype)
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    before = weights_of(model)
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    for components in ((), (0,), (1, 5, 15), None):
        plan = Plan(
            {t.name: components if components is not None else tuple(range(spectra[t.name].rank)) for t in targets}
        )
        with applied(targets, spectra, plan):
            during = weights_of(model)
            changed = {
                t.name for t in targets if not torch.equal(during[f"{t.name}.weight"], before[f"{t.name}.weight"])
            }
            assert changed == (set() if components == () else {t.name for t in targets})
            others = before.keys() - {f"{t.name}.weight" for t in targets}
            assert all(torch.equal(during[name], before[name]) for name in others)
        assert same_bits(weights_of(model), before)
    # In place: whoever holds the parameters, tied modules say, sees the same tensors.
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages


def test_an_error_inside_or_in_the_middle_of_applying_undoes_too(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    before = weights_of(model)
    plan = Plan({target.name: (0,) for target in targets})
    with pytest.raises(KeyboardInterrupt), applied(targets, spectra, plan):
        raise KeyboardInterrupt
    assert same_bits(weights_of(model), before)
    known = {target.name: spectra[target.name] for target in targets[:3]}
    with pytest.raises(KeyError), applied(targets, known, plan):
        raise AssertionError("the fourth module has no spectrum")
    assert same_bits(weights_of(model), before)


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_what_was_tried_before_does_not_change_what_a_plan_gives(
    architecture: str, dtype: str, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture, dtype)
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    plan = Plan({targets[0].name: (0, 2), targets[3].name: (1,)})
    with applied(targets, spectra, plan):
        first = weights_of(model)
    for other in (Plan({targets[0].name: (0,)}), Plan({targets[0].name: (0, 2, 3), targets[1].name: (5,)})):
        with applied(targets, spectra, other):
            pass
    with applied(targets, spectra, plan):
        assert same_bits(weights_of(model), first)


def test_components_in_two_steps_are_those_in_one(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    model = loaded(folder).model
    targets, spectra = targets_of(folder)
    one, two = Plan({targets[0].name: (4, 0)}), Plan({targets[0].name: (2, 4)})
    with applied(targets, spectra, one.union(two)):
        together = weights_of(model)
    with applied(targets, spectra, Plan({targets[0].name: (0, 2, 4)})):
        assert same_bits(weights_of(model), together)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20), (1, 6), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pruned_weight_is_the_svd_without_the_components(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    rank = min(shape)
    spectrum = decompose(W)
    for components in ([], [0], [rank - 1], list(range(0, rank, 2)), list(range(rank))):
        kept = S.clone()
        kept[components] = 0
        found = pruned(W, spectrum, components)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), (U * kept) @ Vh, rtol=0, atol=1e-5)
        A, B = lora_factors(W, spectrum, components)
        assert (A.shape, B.shape) == ((len(components), shape[1]), (shape[0], len(components)))
        assert A.dtype == B.dtype == dtype
        assert A.is_contiguous()
        assert B.is_contiguous()
        torch.testing.assert_close(W + B @ A, found, rtol=0, atol=1e-5)
    torch.testing.assert_close(pruned(W, spectrum, range(rank)), torch.zeros_like(W), rtol=0, atol=1e-5)
    assert torch.equal(pruned(W, spectrum, []), W)


def test_a_sixteen_bit_weight_is_rounded_once() -> None:
    W = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = pruned(W, decompose(W), [0, 1])
    exact = pruned(W.double(), decompose(W.double()), [0, 1])
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of eight digits, and a hair for values that lie in the middle of two.
    assert bool(((found.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all())


def test_removing_twice_is_removing_once() -> None:
    W = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = decompose(W)
    once = pruned(W, spectrum, [1, 3])
    torch.testing.assert_close(pruned(once, spectrum, [1, 3]), once, rtol=0, atol=1e-12)


def in_blocks(folder: Path, name: str, clustered: bool) -> tuple[list[Target], dict[str, Spectrum], Plan]:
    """A weight in three row blocks, of which two lose components, and a plan that edits another whole weight too."""
    targets, spectra = targets_of(folder)
    target = next(t for t in targets if t.name.endswith(name))
    blocks = target.cluster(3, seed=0) if clustered else target.split(3)
    plan = Plan({blocks[0].name: (0, 2), blocks[2].name: (1,), targets[0].name: (0, 1)})
    known = {**spectra, **{block.name: decompose(block.weight) for block in blocks}}
    return [*targets, *blocks], known, plan


BLOCKS = [
    ("llama", "1.mlp.up_proj"),
    ("gpt2", "1.mlp.c_fc"),
    ("gpt2", "0.attn.c_proj"),
    ("qwen2", "1.self_attn.q_proj"),
]


@pytest.mark.parametrize("clustered", [False, True], ids=["contiguous", "clustered"])
@pytest.mark.parametrize(("architecture", "name"), BLOCKS)
def test_row_blocks_are_pruned_each_by_its_own_svd_and_all_is_undone_to_the_bit(
    architecture: str, name: str, clustered: bool, tiny_models: TinyModels
) -> None:
    folder = tiny_models(architecture)
    model = loaded(folder).model
    targets, spectra, plan = in_blocks(folder, name, clustered)
    before = weights_of(model)
    expected = targets[-1].whole_weight.clone()
    for block in targets[-3:]:
        assert block.rows is not None
        U, S, Vh = torch.linalg.svd(block.weight.double(), full_matrices=False)
        S[list(plan.components.get(block.name, ()))] = 0
        expected[block.rows.index] = ((U * S) @ Vh).float()
    with applied(targets, spectra, plan):
        torch.testing.assert_close(targets[-1].whole_weight, expected, rtol=0, atol=1e-5)
        during = weights_of(model)
        changed = {n for n in before if not torch.equal(before[n], during[n])}
        assert changed == {f"{targets[-1].module_name}.weight", f"{targets[0].name}.weight"}
    assert same_bits(weights_of(model), before)
    A, B = module_factors([targets[-3], targets[-1]], spectra, plan)
    assert A.shape[0] == B.shape[1] == 3
    torch.testing.assert_close(targets[-1].whole_weight + B @ A, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_factors_of_a_module_have_no_more_ranks_than_its_weight(architecture: str, tiny_models: TinyModels) -> None:
    for target in targets_of(tiny_models(architecture))[0]:
        blocks = target.split(2)
        spectra = {block.name: decompose(block.weight) for block in blocks}
        plan = Plan({block.name: tuple(range(1, min(block.shape))) for block in blocks})
        A, B = module_factors(blocks, spectra, plan)
        assert A.shape[0] == B.shape[1] == min(plan.size, *target.shape)
        with applied(blocks, spectra, plan):
            expected = target.weight.clone()
        torch.testing.assert_close(target.weight + B @ A, expected, rtol=0, atol=1e-5)

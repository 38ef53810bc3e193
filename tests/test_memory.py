"""What a backward keeps, and what is done where memory ends: smaller batches, checkpointed blocks, the same result."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from service.jobs import Objective
from tests import plain, tiny
from tests.live import REPOSITORY
from tests.plain import ARCHITECTURES, MIXTURES, encoded, loaded, targets_of, within_window
from workers.batching import in_batches
from workers.benchmark.cells import measure_fb
from workers.evaluation import evaluate, honours_tree_mask, losses, score
from workers.examples import Encoded, Layout, batches
from workers.gradients import Effects, checkpointed, effects
from workers.memory import is_out_of_memory
from workers.targets import decoder_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Each failed attempt collects garbage: without a look at all that torch and transformers hold, it is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


TinyModels = Callable[..., Path]
BOTH = Objective.BOTH


def packed() -> Layout:
    """A layout of the test's own: it learns what memory holds."""
    return Layout(packed=True, padding=1024)  # only memory makes batches smaller


def backward(folder: Path, examples: Sequence[Encoded], layout: Layout) -> Effects:
    targets, spectra = targets_of(folder)
    found, unreached = effects(loaded(folder).model, targets, spectra, examples, BOTH, layout)
    assert not unreached
    return found


def assert_same(found: Effects, expected: Effects) -> None:
    assert set(found.by_module) == set(expected.by_module)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, a in expected.by_module.items():
        torch.testing.assert_close(found.by_module[name], a, rtol=1e-3, atol=1e-5 * float(a.abs().max()), msg=name)


# --- what a backward keeps --------------------------------------------------------------------------------------


class Peak:
    """Most bytes that torch held at once on the processor, beyond what it held at first."""

    bytes: int = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """Every allocation and release of the context, from torch's own record of them."""
    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield found
    results: Any = recorded.profiler
    held = 0
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        found.bytes = max(found.bytes, held)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough that its activations, not its logits, fill memory."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
    return tiny.build("llama", tmp_path_factory.mktemp("wide") / "llama", shape=shape)


def long_examples(count: int, tokens: int = 128) -> list[Encoded]:
    return [Encoded(tuple((7 * n + 3 * k) % 256 for k in range(tokens)), ((n % 256,),), 0, ("",)) for n in range(count)]


def test_a_backward_holds_at_most_half_more_than_one_batch_without_hooks_does(wide: Path) -> None:
    model = loaded(wide).model
    targets_of(wide)
    examples = long_examples(24)
    first, second, third = batches(examples, packed())
    with peak() as plainly:
        model.requires_grad_(False)
        handle = model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_(True))  # type: ignore[operator]
        losses(score(model, first), first, BOTH).sum().backward()  # type: ignore[no-untyped-call]
        handle.remove()
        model.requires_grad_(True)
    with peak() as hooked:
        found = backward(wide, examples, packed())
    results = sum(a.nbytes for a in found.by_module.values())
    assert first.input_ids.numel() == second.input_ids.numel() == third.input_ids.numel() == 1024
    assert plainly.bytes > 20e6
    assert hooked.bytes - results < 1.5 * plainly.bytes
    with checkpointed(model), peak() as again:
        backward(wide, examples, packed())
    assert again.bytes - results < 0.5 * plainly.bytes


# --- smaller batches --------------------------------------------------------------------------------------------


@contextmanager
def memory_for(
    model: nn.Module, tokens: int, error: Callable[[], Exception], *, in_backward: bool = False
) -> Iterator[list[int]]:
    """A model whose first block is out of memory for batches of more tokens. Gives the tokens of what was tried.

    In the backward the first block is the last to come: the others' effects are then already added.
    """
    tried: list[int] = []

    def fail(gradient: Tensor) -> None:
        raise error()

    def block(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        size = hidden.shape[0] * hidden.shape[1]
        tried.append(size)
        if size > tokens:
            if not in_backward:
                raise error()
            hidden.register_hook(fail)

    handle = decoder_blocks(model)[1][0].register_forward_hook(block)
    try:
        yield tried
    finally:
        handle.remove()


ERRORS: dict[str, Callable[[], Exception]] = {
    "CUDA's": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python's": MemoryError,
    "the processor's": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
}


@pytest.mark.parametrize(("kind", "in_backward"), [("CUDA's", False), ("the processor's", True), ("Python's", True)])
def test_a_backward_out_of_memory_goes_on_in_smaller_batches_and_counts_nothing_twice(
    kind: str, in_backward: bool, tiny_models: TinyModels
) -> None:
    folder = tiny_models("llama")
    examples = encoded(folder) * 4
    expected = backward(folder, examples, packed())
    layout = packed()
    with memory_for(loaded(folder).model, 100, ERRORS[kind], in_backward=in_backward) as tried:
        found = backward(folder, examples, layout)
        assert tried[0] > 200
        assert sum(size > 100 for size in tried) >= 2
        assert_same(found, expected)
        # What was learnt holds for the next pass: it fails no more.
        tried.clear()
        assert_same(backward(folder, examples, layout), expected)
        assert max(tried) <= 100


def test_a_backward_that_needs_smaller_batches_leaves_those_of_evaluations_as_they_were(
    tiny_models: TinyModels,
) -> None:
    folder = tiny_models("llama")
    layout = packed()
    with memory_for(loaded(folder).model, 100, MemoryError):
        backward(folder, encoded(folder) * 4, layout)
    with memory_for(loaded(folder).model, 10**6, MemoryError) as tried:
        evaluate(loaded(folder).model, encoded(folder) * 4, BOTH, layout)
    assert len(tried) == 1


@pytest.mark.parametrize("layout", [packed, lambda: Layout(packed=False, padding=1024)], ids=["packed", "flat"])
def test_an_evaluation_out_of_memory_goes_on_in_smaller_batches(
    layout: Callable[[], Layout], tiny_models: TinyModels
) -> None:
    folder = tiny_models("gpt2")
    model, examples = loaded(folder).model, encoded(folder) * 4
    expected = evaluate(model, examples, BOTH, layout())
    shared = layout()
    with memory_for(model, 150, ERRORS["CUDA's"]) as tried:
        found = evaluate(model, examples, BOTH, shared)
        assert max(tried) > 150
        tried.clear()
        evaluate(model, examples, BOTH, shared)
        assert max(tried) <= 150
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, err_msg=name)


def test_the_look_at_packed_rows_divides_the_single_rows_it_compares_them_with(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    labels = [f" {a} {b}" for a in ("yes", "no", "good", "red") for b in ("city", "country", "France", "Paris")]
    (one,) = encoded(folder, [plain.EXAMPLES[0].model_copy(update={"completion": labels[0], "choices": labels})])
    with memory_for(loaded(folder).model, plain.row_length(one), MemoryError) as tried:
        assert honours_tree_mask(loaded(folder).model, [one])
    assert max(tried) > plain.row_length(one)


def test_an_example_that_does_not_fit_alone_is_the_error_it_was_and_other_errors_are_not_retried(
    tiny_models: TinyModels,
) -> None:
    folder = tiny_models("llama")
    model, examples = loaded(folder).model, encoded(folder)
    for work in (lambda: backward(folder, examples, packed()), lambda: evaluate(model, examples, BOTH, packed())):
        with memory_for(model, 1, ERRORS["CUDA's"]) as tried, pytest.raises(torch.OutOfMemoryError):
            work()
        assert tried == sorted(tried, reverse=True)
        with (
            memory_for(model, 1, lambda: RuntimeError("a shape is wrong")) as tried,
            pytest.raises(RuntimeError, match="a shape is wrong"),
        ):
            work()
        assert len(tried) == 1
    assert not any(vars(block).get("forward") for block in decoder_blocks(model)[1])


def test_every_example_is_run_once_whatever_failed_before(tiny_models: TinyModels) -> None:
    examples = encoded(tiny_models("llama")) * 5
    limits = iter([60, 200, 90] * 50)

    def run(batch: Any) -> int:
        if batch.input_ids.numel() > next(limits) and len(batch.examples) > 1:
            raise MemoryError
        return int(batch.input_ids.shape[0])

    layout = packed()
    done = [i for batch, rows in in_batches(examples, layout, "forward", run) for i in batch.examples if rows]
    assert sorted(done) == list(range(len(examples)))
    assert layout.limits["forward"] < 200


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        *((make(), True) for make in ERRORS.values()),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_the_ends_of_memory_are_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


# --- checkpointed blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES + MIXTURES)
def test_checkpointed_blocks_give_the_same_effects(architecture: str, tiny_models: TinyModels) -> None:
    folder = tiny_models(architecture)
    examples = within_window(folder, encoded(folder))
    expected = backward(folder, examples, packed())
    calls: list[nn.Module] = []
    first = decoder_blocks(loaded(folder).model)[1][0]
    inner = next(module for module in first.modules() if not list(module.children()))
    handle = inner.register_forward_pre_hook(lambda module, _: calls.append(module))
    with checkpointed(loaded(folder).model):
        found = backward(folder, examples, packed())
    handle.remove()
    assert len(calls) == 2  # once in the forward, once again in the backward
    assert_same(found, expected)


def test_an_example_that_does_not_fit_alone_is_tried_with_checkpointed_blocks(tiny_models: TinyModels) -> None:
    folder = tiny_models("llama")
    model, examples = loaded(folder).model, encoded(folder)
    expected = backward(folder, examples, packed())
    blocks = decoder_blocks(model)[1]
    plain_forward = type(blocks[0]).forward
    attempts: list[bool] = []

    def kept_whole(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """Out of memory unless the block's activations are computed again."""
        whole = getattr(module.forward, "__func__", None) is plain_forward
        attempts.append(whole)
        if whole:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = blocks[-1].register_forward_hook(kept_whole)
    try:
        found = backward(folder, examples, packed())
        tried = list(attempts)
        assert measure_fb(model, examples, packed()) > 0  # the benchmark's unit of cost
    finally:
        handle.remove()
    assert_same(found, expected)
    attempts = tried
    whole = sum(attempts)
    assert attempts[:whole] == [True] * whole  # once on, it stays on for the pass
    assert whole >= 2
    assert all(getattr(block.forward, "__func__", None) is plain_forward for block in blocks)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from tests.plain import loaded, targets_of
from tests.test_memory import BOTH, backward, evaluate, long_examples
from workers.examples import Layout

torch.set_num_threads(1)
folder = Path(sys.argv[1])
examples = long_examples(32, 192)
targets_of(folder)
backward(folder, examples[:1], Layout(packed=True))  # what torch sets up once
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), limit))
layout = Layout(packed=True, tokens=8192)
found = backward(folder, examples, layout)
outcome = evaluate(loaded(folder).model, examples, BOTH, layout)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
expected = backward(folder, examples, Layout(packed=True, tokens=1024))
for name, a in expected.by_module.items():
    torch.testing.assert_close(found.by_module[name], a, rtol=1e-3, atol=1e-5 * float(a.abs().max()))
torch.testing.assert_close(torch.from_numpy(outcome.loss).float(), expected.loss)
print(layout.limits)
"""


def test_a_process_with_too_little_memory_for_its_batches_ends_with_the_same_effects(wide: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(wide), str(128 * 2**20)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "'backward': " in done.stdout, done.stdout

"""The effect of every singular component, and of every other structure, on every example's loss, from one backward.

For an example n and a module with input X (tokens, in), output Y = X W^T and output gradient D (tokens, out),

    a[n, i] = s_i dL_n/ds_i = s_i sum_t (D u_i)[t] (X v_i)[t]                         (METHOD 3)

Removing component i changes L_n by -a[n, i] to first order (Taylor; secondary sources of Compress to Impress,
arXiv 2510.20800, state the opposite sign). Since `W v_i = s_i u_i`, with dX = D W the gradient that the module
sends back,

    a[n, i] = sum_t (dX v_i)[t] (X v_i)[t] = sum_t (D u_i)[t] (Y u_i)[t]

so the singular vectors of the smaller side suffice, and autograd has computed both factors anyway: two products
of (tokens, rank) and (rank, rank) a module. What other structures take is written in `workers.recorders`. No weight
gradient exists, no weight requires one, and the memory is O(examples x structures) beside the activations of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from service.jobs import Objective
from workers.batching import free_memory, in_batches
from workers.evaluation import losses, score
from workers.examples import Batch, Encoded, Layout
from workers.memory import is_out_of_memory
from workers.recorders import ComponentRecorder, Recorder, recorder_of, wide_enough
from workers.spectrum import Spectrum
from workers.structures import Unit
from workers.targets import Target, decoder_blocks

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Effects:
    """What one backward pass over N examples gives."""

    by_module: dict[str, Tensor]
    """For each module (N, rank): a[n, i], the fall of example n's loss when component i goes, to first order. For each
    unit of structures (N, count), the same."""
    loss: Tensor
    """(N,) the examples' losses."""
    seconds: float
    """Time of the whole pass."""
    fb_seconds: float
    """Time of its forward and backward alone, without the effects: one FB."""

    @property
    def finite(self) -> Tensor:
        """(N,) bool: the examples whose loss and effects all are numbers."""
        finite = self.loss.isfinite()
        for effect in self.by_module.values():
            finite &= effect.isfinite().all(1).cpu()
        return finite


@contextmanager
def _hooked(model: nn.Module, recorders: Sequence[Recorder]) -> Iterator[None]:
    """The recorders' hooks, and gradients that reach the first block though no parameter wants one."""
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        handles = [embeddings.register_forward_hook(want_gradient)]
        handles += [handle for recorder in recorders for handle in recorder.attach()]
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model requires a gradient, for the length of the context."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def want_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook of the embeddings, by which the first block's input has a gradient. A copy is handed on: a model
    may change what it is given in place (CTRL scales it), which autograd allows of no leaf."""
    return output.requires_grad_(True).clone()


def effects(
    model: nn.Module,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    encoded: Sequence[Encoded],
    objective: Objective,
    layout: Layout,
    *,
    units: Sequence[Unit] = (),
    on_batch: Callable[[float], None] = lambda _: None,
) -> tuple[Effects, dict[str, str]]:
    """Every component's and every structure's effect on every example, by one forward and backward over `encoded`.

    The gradients are those of the model as it is, the components those of its base weights (`spectra`): after a
    first pass the removed ones are merely gone.

    Args:
        units: of structures, beside components.
        on_batch: told the fraction of examples done.

    Returns:
        The effects, and for each target or unit that no gradient reached, why; those have no entry in `by_module`.
    """
    started = time.perf_counter()
    N = len(encoded)
    dtype = wide_enough(next(model.parameters()))
    recorders: list[Recorder] = [ComponentRecorder(t, spectra[t.name], N, dtype) for t in targets]
    recorders += [recorder_of(unit, N, dtype) for unit in units]
    loss = torch.zeros(N, dtype=dtype)
    done = 0
    device = next(model.parameters()).device

    def backward(batch: Batch) -> Tensor:
        """(E,): the examples' losses."""
        on_device = batch.to(device)
        examples = torch.tensor(batch.examples, device=device)
        for recorder in recorders:
            recorder.rows = examples[on_device.row_example]
            recorder.tokens = batch.input_ids.shape[1]
            recorder.effect[examples] = 0  # of an attempt that ran out of memory half way
        with torch.enable_grad():
            loss = losses(score(model, on_device), on_device, objective)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with _hooked(model, recorders), Checkpointing(model) as within_memory:
        for batch, loss_of_each in in_batches(encoded, layout, "backward", within_memory(backward)):
            loss[batch.examples] = loss_of_each.to("cpu", dtype)
            done += len(batch.examples)
            on_batch(done / N)
    seconds = time.perf_counter() - started
    found, unreached = {}, {}
    for recorder in recorders:
        if recorder.unattributable:
            unreached[recorder.name] = "its tokens are regrouped and cannot be attributed to examples"
        elif not recorder.reached:
            why = "no gradient reached it" if recorder.called else "the forward pass does not call it"
            unreached[recorder.name] = why
        else:
            found[recorder.name] = recorder.effect
    hooks = sum(recorder.seconds for recorder in recorders)
    return Effects(found, loss, seconds, seconds - hooks), unreached


class Checkpointing(ExitStack):
    """For what takes gradients batch by batch: from the first example on that alone is too much for memory, blocks are
    checkpointed, until the context ends. They keep their inputs alone and are computed again in the backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.on = False

    def __call__(self, run: Callable[[Batch], Result]) -> Callable[[Batch], Result]:
        """`run`, run again where it was out of memory for want of checkpointing: what a failure leaves behind must not
        count."""

        def within_memory(batch: Batch) -> Result:
            try:
                return run(batch)
            except Exception as error:
                if self.on or len(batch.examples) > 1 or not is_out_of_memory(error):
                    raise
            free_memory()
            self.enter_context(checkpointed(self.model))
            self.on = True
            return run(batch)

        return within_memory


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Every decoder block keeps only its input for the backward and is computed again there.

    Not by transformers' own switch, which works in training mode alone, where dropout would change the gradients.
    """
    with ExitStack() as stack:
        for block in decoder_blocks(model)[1]:
            before = vars(block).get("forward")
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            object.__setattr__(block, "forward", again)
            undo = partial(object.__delattr__, block, "forward")
            stack.callback(undo if before is None else partial(object.__setattr__, block, "forward", before))
        yield

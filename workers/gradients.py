"""The effect of every singular component on every example's loss, from one backward pass.

For an example n and a module with input X (tokens, in), output Y = X W^T and output gradient D (tokens, out),

    a[n, i] = s_i dL_n/ds_i = s_i sum_t (D u_i)[t] (X v_i)[t]                         (METHOD 3)

Removing component i changes L_n by -a[n, i] to first order (Taylor; secondary sources of Compress to Impress,
arXiv 2510.20800, state the opposite sign). Since `W v_i = s_i u_i`, with dX = D W the gradient that the module
sends back,

    a[n, i] = sum_t (dX v_i)[t] (X v_i)[t] = sum_t (D u_i)[t] (Y u_i)[t]

so the singular vectors of the smaller side suffice, and autograd has computed both factors anyway: two products
of (tokens, rank) and (rank, rank) a module. No weight gradient exists, no weight requires one, and the memory is
O(examples x rank) beside the activations of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from service.jobs import Objective
from workers.batching import free_memory, in_batches
from workers.evaluation import losses, score
from workers.examples import Batch, Encoded, Layout
from workers.memory import is_out_of_memory
from workers.spectrum import Spectrum
from workers.targets import Target, decoder_blocks


@dataclass(frozen=True, eq=False)
class Effects:
    """What one backward pass over N examples gives."""

    by_module: dict[str, Tensor]
    """For each module (N, rank): a[n, i], the fall of example n's loss when component i goes, to first order."""
    loss: Tensor
    """(N,) the examples' losses."""
    seconds: float
    """Time of the whole pass."""
    fb_seconds: float
    """Time of its forward and backward alone, without the effects: one FB."""


class _Recorder:
    """One target: adds up its components' effects as gradients come through."""

    def __init__(self, target: Target, spectrum: Spectrum, effect: Tensor) -> None:
        self.target = target
        self.bias = target.bias
        self.spectrum = spectrum
        self.effect = effect  # (N, rank), added to in place
        self.rows = torch.empty(0)  # (R,) the example of each row of the batch under way
        self.tokens = 0  # T of the batch under way
        self.called = False
        self.reached = False
        self.unattributable = False
        self.seconds = 0.0

    def on_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook."""
        self._note_call(inputs[0])
        return (_Tap.apply(inputs[0], inputs[0], self), *inputs[1:])  # type: ignore[no-untyped-call]

    def on_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook."""
        self._note_call(inputs[0])
        value = output if self.spectrum.side == "out" else inputs[0].detach()
        tapped: Tensor = _Tap.apply(output, value, self)  # type: ignore[no-untyped-call]
        return tapped

    def _note_call(self, X: Tensor) -> None:
        """Tokens may be regrouped, by experts say, and no longer belong to rows; DeBERTa projects embeddings of
        distances by the same module, to which no gradient goes, and they would be missed."""
        self.called = True
        R, T = self.rows.numel(), self.tokens
        self.unattributable |= X.shape[:-1] not in ((R, T), (R * T,))

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hook the side of the module that the components' basis is of; the output for a row block, since what the
        module sends back is the gradient of all rows."""
        if self.spectrum.side == "in" and self.target.rows is None:
            return module.register_forward_pre_hook(self.on_input)
        return module.register_forward_hook(self.on_output)

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Add what one call of the module contributes.

        Args:
            value: X or Y, (R, T, width) or (R T, width).
            gradient: dX or D, of the same shape; D for a row block.
        """
        if self.unattributable:
            return
        started = time.perf_counter()
        rows = self.target.rows
        if rows is not None:
            gradient = gradient[..., rows.index]
            if self.spectrum.side == "in":
                gradient = gradient @ self.target.weight
            else:
                value = value[..., rows.index]
        if self.spectrum.side == "out" and self.bias is not None:
            value = value - self.bias
        R = self.rows.numel()
        self.reached = True
        basis = self.spectrum.basis.to(_wide_enough(value))
        P = gradient.reshape(R, -1, gradient.shape[-1]).to(basis.dtype) @ basis
        Q = value.reshape(R, -1, value.shape[-1]).to(basis.dtype) @ basis
        self.effect.index_add_(0, self.rows, (P * Q).sum(1).to(self.effect.dtype))
        self.seconds += time.perf_counter() - started


class _Tap(torch.autograd.Function):
    """The identity, whose backward shows a recorder the gradient together with a value of the forward.

    Autograd itself keeps the value from the forward to the backward: so it is freed as soon as it is used, and is
    not kept at all but computed again where a block is checkpointed.
    """

    @staticmethod
    def forward(ctx: Any, through: Tensor, value: Tensor, recorder: _Recorder) -> Tensor:
        ctx.save_for_backward(value)
        ctx.recorder = recorder
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        ctx.recorder.add(value, gradients[0])
        return gradients[0], None, None


def _wide_enough(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def _hooked(model: nn.Module, targets: Sequence[Target], recorders: Sequence[_Recorder]) -> Iterator[None]:
    """Hooks on every target, and gradients that reach the first block though no parameter wants one."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as stack:
        for parameter in wanted:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        handles = [embeddings.register_forward_hook(lambda *call: call[2].requires_grad_(True))]
        handles += [recorder.attach(target.module) for target, recorder in zip(targets, recorders, strict=True)]
        for handle in handles:
            stack.callback(handle.remove)
        yield


def effects(
    model: nn.Module,
    targets: Sequence[Target],
    spectra: Mapping[str, Spectrum],
    encoded: Sequence[Encoded],
    objective: Objective,
    layout: Layout,
    *,
    on_batch: Callable[[float], None] = lambda _: None,
) -> tuple[Effects, dict[str, str]]:
    """Every component's effect on every example, by one forward and backward over `encoded`.

    The gradients are those of the model as it is, the components those of its base weights (`spectra`): after a
    first pass the removed ones are merely gone.

    Args:
        on_batch: told the fraction of examples done.

    Returns:
        The effects, and for each target that no gradient reached, why; those have no entry in `by_module`.
    """
    started = time.perf_counter()
    N = len(encoded)
    dtype = _wide_enough(next(model.parameters()))
    recorders = [
        _Recorder(target, spectrum, spectrum.S.new_zeros(N, spectrum.rank, dtype=dtype))
        for target, spectrum in ((t, spectra[t.name]) for t in targets)
    ]
    loss = torch.zeros(N, dtype=dtype)
    done = 0
    with _hooked(model, targets, recorders), _Backward(model, objective, recorders) as backward:
        for batch, loss_of_each in in_batches(encoded, layout, "backward", backward):
            loss[batch.examples] = loss_of_each.to("cpu", dtype)
            done += len(batch.examples)
            on_batch(done / N)
    seconds = time.perf_counter() - started
    found, unreached = {}, {}
    for target, recorder in zip(targets, recorders, strict=True):
        if recorder.unattributable:
            unreached[target.name] = "its tokens are regrouped and cannot be attributed to examples"
        elif not recorder.reached:
            why = "no gradient reached it" if recorder.called else "the forward pass does not call it"
            unreached[target.name] = why
        else:
            found[target.name] = recorder.effect
    hooks = sum(recorder.seconds for recorder in recorders)
    return Effects(found, loss, seconds, seconds - hooks), unreached


class _Backward(ExitStack):
    """Forward and backward of one batch. From the first example on that alone is too much for memory, blocks are
    checkpointed: they keep their inputs alone and are computed again in the backward."""

    def __init__(self, model: nn.Module, objective: Objective, recorders: Sequence[_Recorder]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.recorders = recorders
        self.checkpointing = False

    def __call__(self, batch: Batch) -> Tensor:
        """(E,): the examples' losses."""
        try:
            return self._run(batch)
        except Exception as error:
            if self.checkpointing or len(batch.examples) > 1 or not is_out_of_memory(error):
                raise
        free_memory()
        self.enter_context(checkpointed(self.model))
        self.checkpointing = True
        return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        on_device = batch.to(device)
        examples = torch.tensor(batch.examples, device=device)
        for recorder in self.recorders:
            recorder.rows = examples[on_device.row_example]
            recorder.tokens = batch.input_ids.shape[1]
            recorder.effect[examples] = 0  # of an attempt that ran out of memory half way
        with torch.enable_grad():
            loss = losses(score(self.model, on_device), on_device, self.objective)
            loss.sum().backward()  # type: ignore[no-untyped-call]
        return loss.detach()


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

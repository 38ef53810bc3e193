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

Of a block of output rows, D and Y are those rows' columns, and its share of dX is one product more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.jobs import Objective
from workers.evaluation import losses, score
from workers.examples import Batch, Encoded, Layout, batches
from workers.spectrum import Spectrum
from workers.targets import Target


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
    """Hooks of one target: keeps what a forward sent through it until the backward comes."""

    def __init__(self, target: Target, spectrum: Spectrum, effect: Tensor) -> None:
        self.target = target
        self.bias = target.bias
        self.spectrum = spectrum
        self.effect = effect  # (N, rank), added to in place
        self.rows: Tensor | None = None  # (R,) the example of each row of the batch under way
        self.tokens = 0  # T of the batch under way
        self.sent: list[Tensor] = []  # a stack, since a module may be called more than once
        self.called = 0
        self.reached = 0
        self.unattributable = False
        self.seconds = 0.0

    def forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.called += 1
        rows = self.target.rows
        if self.spectrum.side == "in":
            self.sent.append(inputs[0].detach())
        else:
            self.sent.append(output.detach() if rows is None else output.detach()[..., rows.index])

    def backward(
        self, module: nn.Module, grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
    ) -> None:
        started = time.perf_counter()
        sent = self.sent.pop()
        rows = self.target.rows
        gradient = grad_inputs[0] if self.spectrum.side == "in" and rows is None else grad_outputs[0]
        if gradient is None or self.rows is None:
            return
        if rows is not None:
            gradient = gradient[..., rows.index]
            if self.spectrum.side == "in":
                gradient = gradient @ self.target.weight
        if self.spectrum.side == "out" and self.bias is not None:
            sent = sent - self.bias
        R = self.rows.numel()
        if sent.shape[0] != (R * self.tokens if sent.ndim == 2 else R):
            self.unattributable = True  # tokens were regrouped, by experts say, and no longer belong to rows
            return
        self.reached += 1
        basis = self.spectrum.basis.to(_wide_enough(sent))
        P = gradient.reshape(R, -1, gradient.shape[-1]).to(basis.dtype) @ basis
        Q = sent.reshape(R, -1, sent.shape[-1]).to(basis.dtype) @ basis
        self.effect.index_add_(0, self.rows, (P * Q).sum(1).to(self.effect.dtype))
        self.seconds += time.perf_counter() - started


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
        for target, recorder in zip(targets, recorders, strict=True):
            handles.append(target.module.register_forward_hook(recorder.forward))
            handles.append(target.module.register_full_backward_hook(recorder.backward))
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
    with _hooked(model, targets, recorders):
        for batch in batches(encoded, layout):
            loss[batch.examples] = _backward(model, batch, objective, recorders).to("cpu", dtype)
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


def _backward(model: nn.Module, batch: Batch, objective: Objective, recorders: Sequence[_Recorder]) -> Tensor:
    device = next(model.parameters()).device
    on_device = batch.to(device)
    index = torch.tensor(batch.examples, device=device)[on_device.row_example]
    for recorder in recorders:
        recorder.rows = index
        recorder.tokens = batch.input_ids.shape[1]
        recorder.sent.clear()
    with torch.enable_grad():
        loss = losses(score(model, on_device), on_device, objective)
        loss.sum().backward()  # type: ignore[no-untyped-call]
    return loss.detach()

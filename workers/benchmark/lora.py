"""LoRA (arXiv 2106.09685) by PEFT, trained on the gradient split: the peer that trains.

As METHOD 7 has it: rank 8 on the query and value projections, up to 6 epochs, the best epoch by the loss of the
selection split; the untrained base is among those compared. The loss is that of every other method here.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from service.errors import UnusableModel
from workers.batching import in_batches
from workers.benchmark.cells import OBJECTIVE, Cell
from workers.benchmark.clock import now
from workers.evaluation import Outcome, evaluate, losses, score
from workers.examples import Batch
from workers.gradients import Checkpointing, frozen
from workers.progress import folder_bytes

RANK = 8
ALPHA = 16
EPOCHS = 6
BATCH = 10
# Least selection loss on CounterFact, 100 gradient and 60 selection rows, one seed, from 6.79: 3.55 (epoch 3) at 2e-3,
# 4.47 (epoch 6) with 5e-4. Nothing else was tried: neither 1e-3 and 4e-3, nor a second task, nor a constant rate.
LEARNING_RATE = 2e-3
LARGEST_NORM = 1.0
"""Gradients longer than this are cut to it."""
# Names of the query and value projections, fused ones too, for architectures that PEFT's mapping does not know.
PROJECTIONS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
)


@dataclass(frozen=True, eq=False)
class Trained:
    """The state of least selection loss, on the test split."""

    outcome: Outcome
    epoch: int
    """0 is the base."""
    selection_losses: list[float]
    """Of the base and after each epoch."""
    parameters: int
    """Trained numbers; none, and no bytes, if the base is the best."""
    bytes: int
    seconds: float
    """Of training and selection."""
    test_seconds: float
    drift: float


def train(cell: Cell, learning_rate: float = LEARNING_RATE) -> Trained:
    """Train, choose the epoch, test, and leave the base model as it was."""
    started = now()
    model, selection = cell.bench.base.model, cell.rows.selection
    with _adapter(model, cell.seed, masked=cell.bench.base.masked) as adapted:
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        found: list[float] = []
        states: list[list[Tensor]] = []
        for _ in _epochs(cell, trained, learning_rate):
            found.append(float(evaluate(model, selection, OBJECTIVE, cell.layout).loss.mean()))
            states.append([parameter.detach().clone() for parameter in trained])
        epoch = min(range(len(found)), key=lambda k: (found[k], k))
        with torch.no_grad():
            for parameter, value in zip(trained, states[epoch], strict=True):
                parameter.copy_(value)
        seconds = now() - started
        outcome, test_seconds = cell.test()
        drift = cell.bench.neutral.measure()
        size = _saved_bytes(adapted) if epoch else 0
    parameters = sum(parameter.numel() for parameter in trained) if epoch else 0
    return Trained(outcome, epoch, found, parameters, size, seconds, test_seconds, drift)


def _epochs(cell: Cell, trained: list[nn.Parameter], learning_rate: float) -> Iterator[int]:
    """The untrained adapter, then an epoch at a time. The learning rate falls linearly to zero over all of them."""
    model, rows = cell.bench.base.model, cell.rows.gradient
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    steps = EPOCHS * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    rng = np.random.default_rng(cell.seed)

    def gradients_of(batch: Batch, count: int) -> tuple[Tensor | None, ...]:
        """Of the mean loss over `count` rows, this batch's part."""
        on_device = batch.to(device)
        with torch.enable_grad():
            loss = losses(score(model, on_device), on_device, OBJECTIVE)
            return torch.autograd.grad(loss.sum() / count, trained, allow_unused=True)

    yield 0
    for epoch in range(1, EPOCHS + 1):
        order = rng.permutation(len(rows)).tolist()
        with Checkpointing(model) as within_memory:
            for start in range(0, len(rows), BATCH):
                chosen = [rows[i] for i in order[start : start + BATCH]]
                run = within_memory(partial(gradients_of, count=len(chosen)))
                optimizer.zero_grad()
                for _, gradients in in_batches(chosen, cell.layout, "backward", run):  # several where rows are long
                    for parameter, gradient in zip(trained, gradients, strict=True):
                        if gradient is not None:
                            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
                optimizer.step()
                schedule.step()
        yield epoch


@contextmanager
def _adapter(model: nn.Module, seed: int, *, masked: bool) -> Iterator[Any]:
    """The model with a new adapter in it. Its own modules, weights and their `requires_grad` come back after."""
    config = LoraConfig(
        task_type=None if masked else "CAUSAL_LM",  # PEFT knows no type of masked models
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=target_modules(model),
    )
    with frozen(model):
        with torch.random.fork_rng(), warnings.catch_warnings():
            # GPT-2's Conv1D: PEFT sets `fan_in_fan_out` itself and says so. And it asks for a property's old name.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config).eval()
        try:
            yield adapted
        finally:
            adapted.unload()
            # PEFT leaves its mark on the model, and would warn of a second adapter at the next cell.
            if hasattr(model, "peft_config"):
                del model.peft_config


def target_modules(model: nn.Module) -> list[str] | str:
    """The query and value projections: as PEFT maps the architecture, else by their usual names.

    Raises:
        UnusableModel: if the model has no such modules.
    """
    config: Any = model.config
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type)
    if known is not None:
        return known if isinstance(known, str) else list(known)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for projections in PROJECTIONS:
        if names.issuperset(projections):
            return list(projections)
    raise UnusableModel("no query and value projections were found to put LoRA on", param="model")


def _saved_bytes(adapted: Any) -> int:
    """Bytes of the adapter's files as PEFT saves them, without its empty model card."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        return folder_bytes(folder)

"""Work on examples batch by batch, in smaller batches where memory ends."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from workers.examples import Batch, Encoded, Layout, Work, batches
from workers.memory import is_out_of_memory

Result = TypeVar("Result")


def in_batches(
    encoded: Sequence[Encoded], layout: Layout, work: Work, run: Callable[[Batch], Result]
) -> Iterator[tuple[Batch, Result]]:
    """Every batch with what `run` makes of it.

    Where `run` is out of memory, the examples of its batch and all that follow are laid out anew with half of that
    batch's tokens, and the layout keeps that limit for what is done with it later. A batch that failed is run again,
    in parts: what `run` leaves behind of a failure must not count.

    Raises:
        The error of `run`: where it is another one, or the batch is of one example and cannot be divided.
    """
    left = list(range(len(encoded)))
    while left:
        within = replace(layout, tokens=layout.limits.get(work, layout.tokens))
        order = left
        for part in batches([encoded[i] for i in order], within):
            batch = replace(part, examples=[order[i] for i in part.examples])
            try:
                result = run(batch)
            except Exception as error:
                if len(batch.examples) == 1 or not is_out_of_memory(error):
                    raise
                layout.limits[work] = batch.input_ids.numel() // 2
            else:
                done = set(batch.examples)
                left = [i for i in left if i not in done]
                yield batch, result
                continue
            free_memory()
            break


def free_memory() -> None:
    """Give back what a failed attempt held. To be called outside of the `except` that caught it: until its end the
    error's traceback holds the attempt's tensors."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()

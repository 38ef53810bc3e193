"""Evaluation that does not run the blocks before the first one that a plan touches (METHOD 6).

On a given split those blocks put out what they do in the current model. `Prefixes.record` evaluates that model and
keeps the outputs; `Prefixes.evaluate` puts one in the place of all blocks before it. Only the blocks' `forward` is
replaced, so masks, rotations, the final norm and the LM head run as always, whatever the architecture.

It is right only where a block takes nothing from earlier ones but the hidden state: not where it reuses their keys
and values (Gemma 3n). That is tried on construction, and a model that fails is always run in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from service.jobs import Objective
from workers.evaluation import Outcome, Scored, evaluate, score
from workers.examples import Batch, Encoded, Layout, batches
from workers.targets import decoder_blocks

LIMIT_BYTES = 2**30
# Relative. The same operations on the same numbers: there is hardly any rounding to allow for.
TOLERANCE = 1e-4

Output = Tensor | tuple[Any, ...] | None
"""A block's output: the hidden state, or a tuple that it is part of."""


class Prefixes:
    """One model's block outputs on one split, held on the model's device."""

    def __init__(
        self, model: nn.Module, encoded: Sequence[Encoded], layout: Layout, *, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        """Records nothing yet; a few passes over one example find out whether the model allows it.

        Args:
            limit_bytes: of all outputs together. Where they are more, every second block's is kept, or every
                fourth, and so on.

        Raises:
            UnusableModel: if the model has no list of blocks.
        """
        self.model, self.encoded, self.layout = model, encoded, layout
        self.limit_bytes = limit_bytes
        self._list_name, self._blocks = decoder_blocks(model)
        self.reusable = len(encoded) > 0 and self._takes_only_the_hidden_state()
        """Whether `evaluate` can leave out blocks with this model."""
        self.stride = 1
        """Outputs are held of blocks `stride - 1`, `2 * stride - 1`, ..."""
        self.held_bytes = 0
        self._outputs: dict[tuple[int, ...], dict[int, Output]] = {}
        """For each batch, by its examples: the inputs of the blocks, by the block's index."""

    def record(self, objective: Objective) -> Outcome:
        """Evaluate the model as it stands and keep its block outputs in place of those kept before.

        To be called again once an accepted plan has changed the current model.
        """
        self.stride, self.held_bytes, self._outputs = 1, 0, {}
        scorer = self._score_and_keep if self.reusable else score
        return evaluate(self.model, self.encoded, objective, self.layout, scorer)

    def evaluate(self, objective: Objective, first_block: int) -> Outcome:
        """As `evaluation.evaluate` on the split, with recorded outputs in place of the blocks before `first_block`.

        Args:
            first_block: the model must be the recorded one in all blocks before this, and outside the blocks.
        """
        start = min(first_block, len(self._blocks) - 1) // self.stride * self.stride

        def score_from_start(model: nn.Module, batch: Batch) -> Scored:
            output = self._outputs.get(tuple(batch.examples), {}).get(start)
            with _standing_in(self._blocks[:start] if output is not None else [], output):
                return score(model, batch)

        return evaluate(self.model, self.encoded, objective, self.layout, score_from_start)

    def first_block(self, names: Iterable[str]) -> int:
        """The first block that the modules or row blocks of these names belong to; the last if there are no names,
        the first for a name outside the blocks."""
        found = [re.match(rf"{re.escape(self._list_name)}\.(\d+)\b", name) for name in names]
        return min((int(match[1]) if match else 0 for match in found), default=len(self._blocks) - 1)

    def _score_and_keep(self, model: nn.Module, batch: Batch) -> Scored:
        kept = self._outputs.setdefault(tuple(batch.examples), {})

        def keep(block: int, output: Output) -> None:
            follower = block + 1
            if follower % self.stride or follower == len(self._blocks):
                return
            kept[follower] = _copy(output)
            self.held_bytes += _size(output)
            while self.held_bytes > self.limit_bytes:
                self.stride *= 2
                for inputs in self._outputs.values():
                    for dropped in [index for index in inputs if index % self.stride]:
                        self.held_bytes -= _size(inputs.pop(dropped))

        with _heard(self._blocks, keep):
            return score(model, batch)

    @torch.no_grad()
    def _takes_only_the_hidden_state(self) -> bool:
        """Whether the longest example fares the same from the last block and from two in the middle: blocks that
        share something in groups are cut apart by one of those two."""
        longest = max(self.encoded, key=lambda example: example.length)
        batch = next(batches([longest], self.layout)).to(next(self.model.parameters()).device)
        L = len(self._blocks)
        outputs: list[Output] = []
        try:
            with _heard(self._blocks, lambda _, output: outputs.append(_copy(output))):
                expected = score(self.model, batch).log_probabilities
            # What a block has stored in itself for later ones would still be right. Late starts come first, so that
            # no block which a later trial skips has run on the example again.
            score(self.model, replace(batch, input_ids=torch.zeros_like(batch.input_ids)))
            for start in sorted({L - 1, min(L // 2 + 1, L - 1), L // 2} - {0}, reverse=True):
                with _standing_in(self._blocks[:start], outputs[start - 1]):
                    found = score(self.model, batch).log_probabilities
                if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
                    return False
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            return False  # a block misses what skipped ones pass on; any other error comes again when all is run
        return True


@contextmanager
def _heard(blocks: Iterable[nn.Module], on_output: Callable[[int, Output], None]) -> Iterator[None]:
    """`on_output` is told each block's index and output."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_hook(lambda _, __, output, index=index: on_output(index, output))
            stack.callback(handle.remove)
        yield


@contextmanager
def _standing_in(blocks: Iterable[nn.Module], output: Output) -> Iterator[None]:
    """None of the blocks runs; each gives a copy of `output`, since what follows may write into its input."""
    stand_in = _copy(output)
    # A module has a `forward` of its own, beside its class's, where a library has wrapped it.
    before = [(vars(block), vars(block).get("forward")) for block in blocks]
    try:
        for attributes, _ in before:
            attributes["forward"] = lambda *_, **__: stand_in
        yield
    finally:
        for attributes, own in before:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own


def _copy(output: Output) -> Output:
    if isinstance(output, Tensor):
        return output.detach().clone()
    if type(output) is tuple:
        return tuple(map(_copy, output))
    if output is None:
        return None
    raise TypeError(f"a block's output holds a {type(output).__name__}")


def _size(output: Output) -> int:
    """Bytes."""
    return output.nbytes if isinstance(output, Tensor) else sum(map(_size, output or ()))

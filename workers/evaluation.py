"""Losses of examples, what is reported of a model on a split, and how two models on one split are compared."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn

from service.jobs import Difference, Objective
from service.reports import Metrics
from workers.batching import in_batches
from workers.examples import Batch, Encoded, Layout, batches

Array = npt.NDArray[np.float64]

# A packed layout that changes a log-probability by more is not honoured by the model. Rounding is far below it.
TREE_TOLERANCE = 1e-3
BOOTSTRAP_ROUNDS = 10_000


@dataclass(frozen=True, eq=False)
class Scored:
    """What the loss needs of one batch of E examples."""

    log_probabilities: Tensor
    """(E, most choices): total log-probability of each continuation, -inf where an example has fewer."""
    exact: Tensor
    """(E,) bool: greedy decoding gives the completion's tokens; with masks, their arg-max does."""


def score(model: nn.Module, batch: Batch) -> Scored:
    """One forward pass; log-probabilities in float32 (float64 for a float64 model).

    Greedy decoding yields the completion exactly if, each token of it given, the next one has the largest logit:
    so `exact` needs no decoding loop. With masks the total is the sum over the answer's positions, all predicted in
    this one pass while the others are masked, and `exact` takes the arg-max of each.
    """
    logits = answer_logits(model, batch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    normaliser = logits.logsumexp(-1)
    token_log_probability = logits[batch.token_query, batch.token_id] - normaliser[batch.token_query]
    C = batch.continuation_slot.numel()
    totals = token_log_probability.new_zeros(C).index_add(0, batch.token_continuation, token_log_probability)
    E = len(batch.examples)
    table = totals.new_full((E * batch.most_choices,), -math.inf).index_put((batch.continuation_slot,), totals)

    greedy = logits.detach().argmax(-1)
    wrong = (greedy[batch.token_query] != batch.token_id).to(totals.dtype)
    mistakes = torch.zeros_like(table).index_put(
        (batch.continuation_slot,), wrong.new_zeros(C).index_add(0, batch.token_continuation, wrong)
    )
    gold = batch.gold[:, None]
    exact = mistakes.view(E, -1).gather(1, gold).squeeze(1) == 0
    return Scored(table.view(E, -1), exact)


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(Q, vocabulary): the logits at the batch's queries. The LM head is applied to no other position."""
    mask = batch.visible
    if mask.ndim == 3:
        # Additive, in the model's dtype: the one form that every attention implementation takes.
        dtype = next(model.parameters()).dtype
        seen = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        mask = seen.masked_fill(~mask, torch.finfo(dtype).min)[:, None]
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": mask}
    if batch.position_ids is None:
        arguments["attention_mask"] = mask.long()  # as tokenizers give it: not every encoder takes booleans
    else:
        arguments["use_cache"] = False
        if "position_ids" in inspect.signature(model.forward).parameters:
            arguments["position_ids"] = batch.position_ids
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head_called = False

    def queries_only(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal head_called
        head_called = True
        return inputs[0][batch.query_row, batch.query_position].unsqueeze(0), *inputs[1:]

    handle = head.register_forward_pre_hook(queries_only)
    try:
        logits: Tensor = model(**arguments).logits
    finally:
        handle.remove()
    # MobileBERT multiplies by its head's weight and calls no head.
    return logits.squeeze(0) if head_called else logits[batch.query_row, batch.query_position]


def losses(scored: Scored, batch: Batch, objective: Objective) -> Tensor:
    """(E,): the loss of each example (METHOD 2). An open example's is its likelihood, whatever the objective."""
    table = scored.log_probabilities
    gold = table.gather(1, batch.gold[:, None]).squeeze(1)
    choice = table.logsumexp(1) - gold
    if objective is Objective.CHOICE:
        return torch.where(batch.closed, choice, -gold)
    if objective is Objective.COMPLETION:
        return -gold
    return torch.where(batch.closed, choice - gold, -gold)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A model on a split of N examples, example by example."""

    loss: Array
    """(N,)"""
    exact: Array
    """(N,) 0 or 1"""
    predicted: npt.NDArray[np.int64]
    """(N,) index of the likeliest choice; 0 for an open example."""
    correct: Array
    """(N,) 0 or 1, NaN for an open example."""

    @property
    def right(self) -> Array:
        """(N,) 0 or 1: the choice is correct, or for an open example the match exact."""
        return np.where(np.isnan(self.correct), self.exact, self.correct)

    @property
    def accuracy(self) -> float | None:
        """Over the examples with choices; None where none has any."""
        closed = self.correct[~np.isnan(self.correct)]
        return float(closed.mean()) if closed.size else None

    @property
    def broken(self) -> int:
        """How many examples have no finite loss."""
        return int((~np.isfinite(self.loss)).sum())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    encoded: Sequence[Encoded],
    objective: Objective,
    layout: Layout,
    scorer: Callable[[nn.Module, Batch], Scored] = score,
) -> Outcome:
    """Run the model over a split. `scorer` makes the forward pass of a batch (`prefixes` has a shorter one)."""
    N = len(encoded)
    loss, exact, correct = np.zeros(N), np.zeros(N), np.full(N, np.nan)
    predicted = np.zeros(N, dtype=np.int64)
    device = next(model.parameters()).device

    def run(batch: Batch) -> tuple[Scored, Tensor]:
        on_device = batch.to(device)
        scored = scorer(model, on_device)
        return scored, losses(scored, on_device, objective)

    for batch, (scored, loss_of_each) in in_batches(encoded, layout, "forward", run):
        at = batch.examples
        loss[at] = loss_of_each.double().cpu().numpy()
        exact[at] = scored.exact.double().cpu().numpy()
        predicted[at] = scored.log_probabilities.argmax(1).cpu().numpy()
    # A plan that breaks the model, in float16 say, has the worst of losses, not an unknown one.
    loss = np.where(np.isnan(loss), np.inf, loss)
    closed = np.array([example.closed for example in encoded], dtype=bool)
    gold = np.array([example.gold for example in encoded])
    correct[closed] = (predicted == gold)[closed]
    return Outcome(loss, exact, predicted, correct)


@torch.no_grad()
def honours_tree_mask(model: nn.Module, encoded: Sequence[Encoded]) -> bool:
    """Whether packed rows give what single rows give, tried on the example with the most branches and on the one
    with the longest row.

    A model with positions of its own making, with a recurrence, or with a window shorter than the rows does not;
    answers in the place of masks form no tree.
    """
    if encoded[0].mask_at is not None:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    config: Any = getattr(model, "config", None)
    window = getattr(config.get_text_config(), "sliding_window", None) if config is not None else None
    if window and any(_row_length(example) > window for example in encoded):  # some say 0 for none
        return False
    branchiest = max(encoded, key=lambda e: sum(len(c) - 1 for c in e.continuations))
    longest = max((e for e in encoded if e.closed), key=_row_length, default=branchiest)
    device = next(model.parameters()).device
    tolerance = layout_tolerance(model)

    def run(batch: Batch) -> Tensor:
        return score(model, batch.to(device)).log_probabilities

    for tried in (branchiest, longest):
        packed = run(next(batches([tried], Layout(packed=True)))).squeeze(0)
        alone = [replace(tried, continuations=(c,), gold=0, labels=("",)) for c in tried.continuations]
        single = torch.empty_like(packed)
        for batch, found in in_batches(alone, Layout(packed=False), "forward", run):
            single[batch.examples] = found.squeeze(1)
        if not bool((packed - single).abs().max() <= tolerance):
            return False
    return True


def layout_tolerance(model: nn.Module) -> float:
    """By how much a log-probability may differ between two layouts of the same row."""
    return TREE_TOLERANCE if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.25


def _row_length(example: Encoded) -> int:
    """Tokens of the example's packed row, or a few more."""
    return len(example.prompt) + sum(map(len, example.continuations))


# --- what is reported -------------------------------------------------------------------------------------------


def metrics(outcome: Outcome, encoded: Sequence[Encoded]) -> Metrics:
    """Means over a split, and what shows a collapse to one label."""
    closed = [i for i, example in enumerate(encoded) if example.closed]
    golds = Counter(example.labels[example.gold] for example in encoded)
    confusion: dict[str, dict[str, int]] = {}
    for i in closed:
        row = confusion.setdefault(encoded[i].labels[encoded[i].gold], {})
        label = encoded[i].labels[int(outcome.predicted[i])]
        row[label] = row.get(label, 0) + 1
    hits = [int(outcome.correct[i]) for i in closed]
    recalls = [row.get(gold, 0) / sum(row.values()) for gold, row in confusion.items()]
    return Metrics(
        n=len(encoded),
        accuracy=float(np.mean(hits)) if closed else None,
        accuracy_interval=_interval_of_rate(sum(hits), len(hits)) if closed else None,
        exact_match=float(outcome.exact.mean()),
        exact_match_interval=_interval_of_rate(int(outcome.exact.sum()), len(encoded)),
        loss=float(outcome.loss.mean()),
        balanced_accuracy=float(np.mean(recalls)) if closed else None,
        majority_rate=max(golds.values()) / len(encoded),
        confusion=confusion if closed else None,
    )


def _interval_of_rate(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate: it stays within 0 and 1, and has a width where all or none are hits."""
    found = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def differences(base: Outcome, adapted: Outcome, seed: int) -> list[Difference]:
    """Adapted minus base, paired, in each metric there is: accuracy, exact match, loss."""
    found = []
    closed = ~np.isnan(base.correct)
    if closed.any():
        found.append(_of_hits("accuracy", base.correct[closed], adapted.correct[closed], seed))
    found.append(_of_hits("exact_match", base.exact, adapted.exact, seed))
    change = adapted.loss - base.loss
    low, high = _interval(change, seed)
    found.append(
        Difference(metric="loss", value=float(change.mean()), low=low, high=high, p=paired_p(change, two_sided=True))
    )
    return found


def _of_hits(metric: Any, base: Array, adapted: Array, seed: int) -> Difference:
    low, high = _interval(adapted - base, seed)
    p = mcnemar_p(*changes(base, adapted))
    return Difference(metric=metric, value=float((adapted - base).mean()), low=low, high=high, p=p)


def changes(base: Array, other: Array) -> tuple[int, int]:
    """Of hits, (N,) 0 or 1: how many examples are gained, right with the other model only, and how many lost."""
    return int(((other == 1) & (base == 0)).sum()), int(((other == 0) & (base == 1)).sum())


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: `gained` examples are right with one of two models only, `lost` with the
    other only."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _interval(values: Array, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    result = stats.bootstrap((values,), np.mean, n_resamples=BOOTSTRAP_ROUNDS, method="percentile", rng=rng, batch=500)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_p(change: Array, *, two_sided: bool) -> float:
    """p of the paired t-test on `change` (N,), one-sided for a fall below zero unless `two_sided`."""
    if len(change) < 2:
        return 1.0  # one example proves nothing
    if np.ptp(change) == 0:
        return 0.0 if change[0] < 0 or (two_sided and change[0] > 0) else 1.0
    return float(stats.ttest_1samp(change, 0.0, alternative="two-sided" if two_sided else "less").pvalue)

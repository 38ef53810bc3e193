"""Examples as the model reads them: tokenised, and laid out in batches that answer every choice at once.

All continuations of a prompt that a loss needs (one, or every choice) form a prefix tree of tokens behind it. In
the packed layout the prompt and its whole tree are one row: a node attends to the prompt and its own ancestors
only, and stands at the position it would have alone. Ten choices of two tokens cost ten tokens more, not ten
rows. Where a model does not honour such a mask (`evaluation.honours_tree_mask`), each path of the tree is a row.

In an example of a masked language model (`workers.masked`) the continuations stand for a mask token within the
prompt, and those of equally many tokens share a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.jobs import Example, PromptFormat
from service.models import too_long
from workers.chat import ChatTokenizer, render


class Tokenizer(ChatTokenizer, Protocol):
    """What is used of a transformers tokenizer."""

    mask_token: str | None
    mask_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Encoded:
    """One example in tokens."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    """One for each choice; of an open example the completion alone."""
    gold: int
    """Index of the completion in `continuations`."""
    labels: tuple[str, ...]
    """The texts of `continuations`."""
    mask_at: int | None = None
    """Index in `prompt` of the mask token that a continuation stands for; None where it follows the prompt."""
    text: str = ""
    """The prompt as it was sent."""

    @property
    def closed(self) -> bool:
        """Whether there are choices."""
        return len(self.continuations) > 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest continuation."""
        own_mask = 0 if self.mask_at is None else 1
        return len(self.prompt) - own_mask + max(map(len, self.continuations))


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompt_format: PromptFormat,
    context: int | None,
    name: str,
) -> list[Encoded]:
    """Tokenise examples; `name` is the list's name in the job (`examples`, `validation`, `test`) for errors.

    A prompt and its continuation are tokenised together and divided where they first differ from the prompt
    alone, so that a blank between them goes where the tokenizer puts it.

    Raises:
        InvalidInput: for an example longer than `context` tokens, one that a continuation adds no token to, or
            a chat format without a chat template.
    """
    if prompt_format is PromptFormat.CHAT:
        prompts = render(tokenizer, [example.chat for example in examples])
        continuations = [[c.lstrip() for c in example.choices or [example.completion]] for example in examples]
        prefix: list[int] = []  # the template writes its own special tokens
    else:
        prompts = [example.prompt for example in examples]
        continuations = [list(example.choices or [example.completion]) for example in examples]
        prefix = special_prefix(tokenizer)
    bare = _tokens(tokenizer, prompts)
    joined = iter(_tokens(tokenizer, [p + c for p, cs in zip(prompts, continuations, strict=True) for c in cs]))
    encoded = []
    for i, (example, prompt, texts) in enumerate(zip(examples, bare, continuations, strict=True)):
        wholes = [next(joined) for _ in texts]
        common = min(_common_prefix(prompt, whole) for whole in wholes)
        tails = tuple(tuple(whole[common:]) for whole in wholes)
        context_tokens = (*prefix, *prompt[:common])
        if not context_tokens or not all(tails) or len(set(tails)) < len(tails):
            raise InvalidInput(
                "the tokenizer leaves nothing to predict from, nothing to predict, or makes two choices the same",
                param=f"{name}[{i}].prompt",
            )
        gold = example.choices.index(example.completion) if example.choices else 0
        labels = tuple(example.choices or [example.completion])
        one = Encoded(context_tokens, tails, gold, labels, text=example.prompt)
        if context is not None and one.length > context:
            raise too_long(f"{name}[{i}]", one.length, context)
        encoded.append(one)
    return encoded


def _tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text: a Llama's BOS, a GPT-2's nothing."""
    bare = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    full = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


# --- batches ----------------------------------------------------------------------------------------------------

# Tokens of one forward pass, padding included. On two CPU cores larger batches are no faster and hold more memory:
# the activations of a small model with many layers outweigh its weights. A GPU wants larger ones (not tried).
TOKEN_BUDGET = 1024
TOKEN_BUDGET_CUDA = 8192
# Where more of a batch would be padding than this, another batch costs less.
PADDING_BUDGET = 32
PADDING_BUDGET_CUDA = 1024
# Elements of one pass's logits, 256 MB of float32: with a large vocabulary these, not the tokens, fill memory.
LOGIT_BUDGET = 2**26


Work = Literal["forward", "backward"]


@dataclass(frozen=True)
class Layout:
    """How examples are laid out for one model."""

    packed: bool
    """Whether a prompt and the tree of its continuations are one row."""
    tokens: int = TOKEN_BUDGET
    """Most tokens in a batch."""
    answers: int = TOKEN_BUDGET
    """Most positions in a batch whose logits are computed."""
    padding: int = PADDING_BUDGET
    """Most tokens of padding in a batch."""
    limits: dict[Work, int] = field(default_factory=dict, compare=False)
    """Most tokens of a forward alone and of one with its backward, where memory turned out to hold fewer than
    `tokens`. Lowered by `batching.in_batches`, for all that is done with this layout."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as one forward pass. Sizes: E examples, R rows, T tokens a row, Q positions whose logits are
    needed, C continuations over all examples, K continuation tokens over all examples."""

    examples: list[int]
    """E: indices into the encoded split."""
    row_example: Tensor
    """(R,) int64: index into `examples` of each row."""
    input_ids: Tensor
    """(R, T) int64, padded on the left; with masks, on the right."""
    position_ids: Tensor | None
    """(R, T) int64; None with masks: such models count by themselves, RoBERTa's from its padding token's ID on."""
    visible: Tensor
    """(R, T) bool: 0 for padding; or (R, T, T) bool, [r, query, key], where rows hold trees."""
    query_row: Tensor
    """(Q,) int64."""
    query_position: Tensor
    """(Q,) int64: position in the row."""
    token_query: Tensor
    """(K,) int64: the query that predicts the token."""
    token_id: Tensor
    """(K,) int64."""
    token_continuation: Tensor
    """(K,) int64: which of the C continuations it belongs to."""
    continuation_slot: Tensor
    """(C,) int64: cell of the (E, most choices) table, row major."""
    gold: Tensor
    """(E,) int64: index of the completion among the example's continuations."""
    closed: Tensor
    """(E,) bool: whether the example has choices."""
    most_choices: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class _Row:
    """A row under construction: tokens behind the prompt with their parents, -1 being the prompt's end."""

    prompt: tuple[int, ...]
    tokens: list[int]
    parents: list[int]
    depths: list[int]


def batches(encoded: Sequence[Encoded], layout: Layout) -> Iterator[Batch]:
    """Lay all examples out, the long ones first, each batch within the layout's budgets with padding (or of one
    example, where that alone is over)."""
    pending: list[int] = []
    rows = width = answers = filled = 0
    for i in sorted(range(len(encoded)), key=lambda i: (-encoded[i].length, i)):
        own_rows, own_width, more = _size(encoded[i], packed=layout.packed)
        grown = rows + own_rows
        wider = max(width, own_width)
        own_tokens = own_rows * own_width
        padding = grown * wider - filled - own_tokens
        if pending and (grown * wider > layout.tokens or answers + more > layout.answers or padding > layout.padding):
            yield _lay_out(encoded, pending, packed=layout.packed)
            pending, grown, wider, answers, filled = [], own_rows, own_width, 0, 0
        pending.append(i)
        rows, width, answers, filled = grown, wider, answers + more, filled + own_tokens
    if pending:
        yield _lay_out(encoded, pending, packed=layout.packed)


def _size(example: Encoded, *, packed: bool) -> tuple[int, int, int]:
    """An example's rows, the tokens of the longest, and its queries, or a few more."""
    if example.mask_at is not None:
        counts = _mask_counts(example)
        return len(counts), example.length, sum(counts)
    paths, nodes = _tree(example)
    if packed:
        return 1, len(example.prompt) + len(nodes), 1 + len(nodes)
    return len(paths), len(example.prompt) + max(map(len, paths)), 1 + sum(map(len, paths))


def _mask_counts(example: Encoded) -> list[int]:
    """The numbers of tokens that its continuations have: each is a row with so many masks."""
    return sorted({len(tokens) for tokens in example.continuations})


def _tree(example: Encoded) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The longest paths, and a number for each node, of the tree of all tokens that something is predicted from:
    the last token of a continuation is never among them."""
    nodes: dict[tuple[int, ...], int] = {}
    for tokens in example.continuations:
        for end in range(1, len(tokens)):
            nodes.setdefault(tokens[:end], len(nodes))
    inner = {path[:-1] for path in nodes}
    return [path for path in nodes if path not in inner] or [()], nodes


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a batch; the tensors as in `Batch`."""

    row_example: list[int]
    input_ids: Tensor
    position_ids: Tensor | None
    visible: Tensor
    places: list[list[list[tuple[int, int]]]]
    """For each example, continuation and token: the row and the position in it that predict the token."""


def _lay_out(encoded: Sequence[Encoded], chosen: list[int], *, packed: bool) -> Batch:
    examples = [encoded[i] for i in chosen]
    masked = examples[0].mask_at is not None
    rows = _mask_rows(examples) if masked else _tree_rows(examples, packed=packed)
    queries: dict[tuple[int, int], int] = {}
    token_query: list[int] = []
    token_id: list[int] = []
    token_continuation: list[int] = []
    slots: list[int] = []
    most_choices = max(len(example.continuations) for example in examples)
    for e, example in enumerate(examples):
        for c, tokens in enumerate(example.continuations):
            for place, token in zip(rows.places[e][c], tokens, strict=True):
                token_query.append(queries.setdefault(place, len(queries)))
                token_id.append(token)
                token_continuation.append(len(slots))
            slots.append(e * most_choices + c)
    return Batch(
        examples=list(chosen),
        row_example=torch.tensor(rows.row_example),
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        visible=rows.visible,
        query_row=torch.tensor([row for row, _ in queries]),
        query_position=torch.tensor([position for _, position in queries]),
        token_query=torch.tensor(token_query),
        token_id=torch.tensor(token_id),
        token_continuation=torch.tensor(token_continuation),
        continuation_slot=torch.tensor(slots),
        gold=torch.tensor([example.gold for example in examples]),
        closed=torch.tensor([example.closed for example in examples]),
        most_choices=most_choices,
    )


def _mask_rows(examples: Sequence[Encoded]) -> _Rows:
    """A row for each number of tokens that an example's continuations have, with so many masks in their place."""
    T = max(example.length for example in examples)
    rows: list[list[int]] = []
    row_example: list[int] = []
    places: list[list[list[tuple[int, int]]]] = []
    for e, example in enumerate(examples):
        at = example.mask_at or 0
        row_of: dict[int, int] = {}
        for count in _mask_counts(example):
            row_of[count] = len(rows)
            rows.append([*example.prompt[:at], *[example.prompt[at]] * count, *example.prompt[at + 1 :]])
            row_example.append(e)
        places.append([[(row_of[len(c)], at + k) for k in range(len(c))] for c in example.continuations])
    # What stands behind a row's end is not seen and moves no position: padding need not be the padding token.
    input_ids = torch.zeros(len(rows), T, dtype=torch.long)
    visible = torch.zeros(len(rows), T, dtype=torch.bool)
    for r, row in enumerate(rows):
        input_ids[r, : len(row)] = torch.tensor(row)
        visible[r, : len(row)] = True
    return _Rows(row_example, input_ids, None, visible, places)


def _tree_rows(examples: Sequence[Encoded], *, packed: bool) -> _Rows:
    rows: list[_Row] = []
    row_example: list[int] = []
    # For each example: where the token that follows a path is predicted, as (row, node), node -1 the prompt's end.
    places: list[dict[tuple[int, ...], tuple[int, int]]] = []
    for e, example in enumerate(examples):
        paths, nodes = _tree(example)
        place: dict[tuple[int, ...], tuple[int, int]] = {(): (len(rows), -1)}
        if packed:
            ordered = list(nodes)
            parents = [nodes[path[:-1]] if len(path) > 1 else -1 for path in ordered]
            place |= {path: (len(rows), node) for path, node in nodes.items()}
            rows.append(_Row(example.prompt, [p[-1] for p in ordered], parents, [len(p) for p in ordered]))
            row_example.append(e)
        else:
            for path in paths:
                for end in range(1, len(path) + 1):
                    place.setdefault(path[:end], (len(rows), end - 1))
                n = len(path)
                rows.append(_Row(example.prompt, list(path), list(range(-1, n - 1)), list(range(1, n + 1))))
                row_example.append(e)
        places.append(place)

    T = max(len(row.prompt) + len(row.tokens) for row in rows)
    input_ids = torch.zeros(len(rows), T, dtype=torch.long)
    position_ids = torch.zeros(len(rows), T, dtype=torch.long)
    branching = any(parent != k - 1 for row in rows for k, parent in enumerate(row.parents))
    visible = torch.zeros(len(rows), T, dtype=torch.bool)
    for r, row in enumerate(rows):
        start = T - len(row.prompt) - len(row.tokens)
        input_ids[r, start:] = torch.tensor([*row.prompt, *row.tokens])
        position_ids[r, start:] = torch.tensor(
            [*range(len(row.prompt)), *(len(row.prompt) + depth - 1 for depth in row.depths)]
        )
        visible[r, start:] = True
    if branching:
        visible = torch.stack([_tree_mask(row, T) for row in rows])

    found = []
    for example, place in zip(examples, places, strict=True):
        at = {path: (row, T - len(rows[row].tokens) + node) for path, (row, node) in place.items()}
        found.append([[at[tokens[:end]] for end in range(len(tokens))] for tokens in example.continuations])
    return _Rows(row_example, input_ids, position_ids, visible, found)


def _tree_mask(row: _Row, T: int) -> Tensor:
    """(T, T) bool: causal over the prompt; a node sees the prompt, its ancestors and itself. A padding position
    sees itself, since a softmax over nothing is NaN."""
    P, N = len(row.prompt), len(row.tokens)
    start, end = T - P - N, T - N
    mask = torch.eye(T, dtype=torch.bool)
    mask[start:end, start:end] = torch.ones(P, P, dtype=torch.bool).tril()
    mask[end:, start:end] = True
    for k, parent in enumerate(row.parents):
        if parent >= 0:
            mask[end + k, end:] |= mask[end + parent, end:]
    return mask

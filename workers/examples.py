"""Examples as the model reads them: tokenised, and laid out in batches that answer every choice at once.

All continuations of a prompt that a loss needs (one, or every choice) form a prefix tree of tokens behind it. In
the packed layout the prompt and its whole tree are one row: a node attends to the prompt and its own ancestors
only, and stands at the position it would have alone. Ten choices of two tokens cost ten tokens more, not ten
rows. Where a model does not honour such a mask (`evaluation.honours_tree_mask`), each path of the tree is a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.jobs import Example, PromptFormat
from service.models import too_long


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]: ...
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str: ...


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

    @property
    def closed(self) -> bool:
        """Whether there are choices."""
        return len(self.continuations) > 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest continuation."""
        return len(self.prompt) + max(map(len, self.continuations))


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
        if not tokenizer.chat_template:
            raise InvalidInput("the model's tokenizer has no chat template; use `text`", param="prompt_format")
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": example.prompt}], add_generation_prompt=True, tokenize=False
            )
            for example in examples
        ]
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
        one = Encoded(context_tokens, tails, gold, labels)
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
# Elements of one pass's logits, 256 MB of float32: with a large vocabulary these, not the tokens, fill memory.
LOGIT_BUDGET = 2**26


@dataclass(frozen=True)
class Layout:
    """How examples are laid out for one model."""

    packed: bool
    """Whether a prompt and the tree of its continuations are one row."""
    tokens: int = TOKEN_BUDGET
    """Most tokens in a batch."""
    answers: int = TOKEN_BUDGET
    """Most positions in a batch whose logits are computed."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as one forward pass. Sizes: E examples, R rows, T tokens a row, Q positions whose logits are
    needed, C continuations over all examples, K continuation tokens over all examples."""

    examples: list[int]
    """E: indices into the encoded split."""
    row_example: Tensor
    """(R,) int64: index into `examples` of each row."""
    input_ids: Tensor
    """(R, T) int64, padded on the left."""
    position_ids: Tensor
    """(R, T) int64."""
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
    rows = width = answers = 0
    for i in sorted(range(len(encoded)), key=lambda i: (-encoded[i].length, i)):
        paths, nodes = _tree(encoded[i])
        own_rows = 1 if layout.packed else len(paths)
        behind = len(nodes) if layout.packed else max(map(len, paths))
        grown = rows + own_rows
        wider = max(width, len(encoded[i].prompt) + behind)
        more = 1 + (len(nodes) if layout.packed else sum(map(len, paths)))
        if pending and (grown * wider > layout.tokens or answers + more > layout.answers):
            yield _lay_out(encoded, pending, packed=layout.packed)
            pending, grown, wider, answers = [], own_rows, len(encoded[i].prompt) + behind, 0
        pending.append(i)
        rows, width, answers = grown, wider, answers + more
    if pending:
        yield _lay_out(encoded, pending, packed=layout.packed)


def _tree(example: Encoded) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """The longest paths, and a number for each node, of the tree of all tokens that something is predicted from:
    the last token of a continuation is never among them."""
    nodes: dict[tuple[int, ...], int] = {}
    for tokens in example.continuations:
        for end in range(1, len(tokens)):
            nodes.setdefault(tokens[:end], len(nodes))
    inner = {path[:-1] for path in nodes}
    return [path for path in nodes if path not in inner] or [()], nodes


def _lay_out(encoded: Sequence[Encoded], chosen: list[int], *, packed: bool) -> Batch:
    rows: list[_Row] = []
    row_example: list[int] = []
    # For each example: where the token that follows a path is predicted, as (row, node), node -1 the prompt's end.
    places: list[dict[tuple[int, ...], tuple[int, int]]] = []
    for e, i in enumerate(chosen):
        example = encoded[i]
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

    queries: dict[tuple[int, int], int] = {}
    token_query: list[int] = []
    token_id: list[int] = []
    token_continuation: list[int] = []
    slots: list[int] = []
    most_choices = max(len(encoded[i].continuations) for i in chosen)
    for e, i in enumerate(chosen):
        for c, tokens in enumerate(encoded[i].continuations):
            for end, token in enumerate(tokens):
                row_index, node = places[e][tokens[:end]]
                position = T - len(rows[row_index].tokens) + node
                token_query.append(queries.setdefault((row_index, position), len(queries)))
                token_id.append(token)
                token_continuation.append(len(slots))
            slots.append(e * most_choices + c)
    return Batch(
        examples=list(chosen),
        row_example=torch.tensor(row_example),
        input_ids=input_ids,
        position_ids=position_ids,
        visible=visible,
        query_row=torch.tensor([row for row, _ in queries]),
        query_position=torch.tensor([position for _, position in queries]),
        token_query=torch.tensor(token_query),
        token_id=torch.tensor(token_id),
        token_continuation=torch.tensor(token_continuation),
        continuation_slot=torch.tensor(slots),
        gold=torch.tensor([encoded[i].gold for i in chosen]),
        closed=torch.tensor([encoded[i].closed for i in chosen]),
        most_choices=most_choices,
    )


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

"""Examples of a masked language model (RoBERTa, BERT, DistilBERT): the answer stands for a mask within the prompt.

An answer of k tokens takes k mask tokens in its place, all predicted in one forward pass, each while the others are
masked; its total log-probability is the sum over the k positions. So LASER scores answers and choices with RoBERTa
(https://github.com/pratyushasharma/laser, `src/intervention_roberta_*.py`). Two things differ: LASER lets the model
fill five masks for an open answer and looks for the answer in the text, here exact match is the arg-max at each of k
masks; and rows keep the special tokens at both ends, which LASER leaves out for answers of several tokens. The number
of masks tells the model how long an answer is: choices of different lengths are compared each in a row of its own.

A blank before the mask belongs to the answer: RoBERTa's mask token swallows it and stands for `ĠParis`. So the
answer's tokens are those by which the tokenised prompt changes when the answer is put where the mask was.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidInput
from service.jobs import Example, PromptFormat
from service.masks import check_example, check_prompt_format, fill
from service.models import too_long
from workers.examples import Encoded, Tokenizer


def encode(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompt_format: PromptFormat,
    context: int | None,
    name: str,
) -> list[Encoded]:
    """Tokenise examples, as `workers.examples.encode` does for a causal model.

    Raises:
        InvalidInput: for a prompt without exactly one mask token, an answer that has one or that no token is made
            of, two choices of the same tokens, an example longer than `context` tokens, or a chat.
    """
    check_prompt_format(prompt_format)
    mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
    if mask is None or mask_id is None:
        raise ValueError("the tokenizer of a masked language model has a mask token")
    for i, example in enumerate(examples):
        check_example(example, mask, f"{name}[{i}]")
    if not examples:
        return []
    answers = [tuple(example.choices or [example.completion]) for example in examples]
    prompts = tokenizer([example.prompt for example in examples], add_special_tokens=True)["input_ids"]
    filled = [fill(example.prompt, mask, a) for example, own in zip(examples, answers, strict=True) for a in own]
    wholes = iter(tokenizer(filled, add_special_tokens=True)["input_ids"])
    encoded = []
    for i, (example, prompt, own) in enumerate(zip(examples, prompts, answers, strict=True)):
        at = prompt.index(mask_id)
        tails = tuple(
            _between(next(wholes), prompt[:at], prompt[at + 1 :]) or _alone(tokenizer, example.prompt, mask, answer)
            for answer in own
        )
        if not all(tails):
            raise InvalidInput("the tokenizer makes no token of an answer", param=f"{name}[{i}].completion")
        if len(set(tails)) < len(tails):
            raise InvalidInput("the tokenizer makes two choices the same", param=f"{name}[{i}].choices")
        one = Encoded(tuple(prompt), tails, own.index(example.completion), own, mask_at=at, text=example.prompt)
        if context is not None and one.length > context:
            raise too_long(f"{name}[{i}]", one.length, context)
        encoded.append(one)
    return encoded


def _between(whole: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """The tokens that `whole` has between the two, none where it does not begin and end with them."""
    end = len(whole) - len(after)
    if list(whole[: len(before)]) == list(before) and list(whole[end:]) == list(after):
        return tuple(whole[len(before) : end])
    return ()


def _alone(tokenizer: Tokenizer, prompt: str, mask: str, answer: str) -> tuple[int, ...]:
    """The answer's tokens where it would melt into the text around the mask, as `quick` does in `<mask>ly`."""
    blank = prompt.partition(mask)[0][-1:].isspace() or answer[0].isspace()
    return tuple(tokenizer([" " * blank + answer.lstrip()], add_special_tokens=False)["input_ids"][0])

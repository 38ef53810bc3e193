"""What the examples of a masked language model must be, checked before any work.

Each prompt holds the mask token once; the completion, and each choice, is what stands there.
"""

from __future__ import annotations

from service.errors import InvalidInput
from service.jobs import Example, JobSpec, PromptFormat
from service.models import Model


def check_masks(model: Model, spec: JobSpec) -> None:
    """Refuse what a masked language model cannot answer; a causal one reads a mask as text.

    Where the model's files do not tell the mask token, the worker checks, in the same words.

    Raises:
        InvalidInput: for a chat, or naming the first example without exactly one mask.
    """
    if not model.masked:
        return
    check_prompt_format(spec.prompt_format)
    if model.mask_token is not None:
        for at, example in spec.located():
            check_example(example, model.mask_token, at)


def check_prompt_format(prompt_format: PromptFormat) -> None:
    """Refuse a chat with a masked language model."""
    if prompt_format is PromptFormat.CHAT:
        raise InvalidInput("a masked language model takes no turns; use `text`", param="prompt_format")


def check_example(example: Example, mask_token: str, at: str) -> None:
    """Refuse a prompt without exactly one mask, and an answer with any; `at` is `examples[3]`, say."""
    check_prompt(example.prompt, mask_token, f"{at}.prompt")
    for j, choice in enumerate(example.choices or ()):
        if mask_token in choice:
            raise InvalidInput(f"{mask_token} is no answer; it marks where one belongs", param=f"{at}.choices[{j}]")
    if mask_token in example.completion:
        raise InvalidInput(f"{mask_token} is no answer; it marks where one belongs", param=f"{at}.completion")


def check_prompt(prompt: str, mask_token: str, param: str) -> None:
    """Refuse a prompt without exactly one mask; `param` is the field that it stands in."""
    count = prompt.count(mask_token)
    if count != 1:
        raise InvalidInput(
            f"it holds the mask token {count:,} times; a prompt for this model holds {mask_token} once, where the "
            "completion belongs",
            param=param,
        )


def fill(prompt: str, mask_token: str, answer: str) -> str:
    """The prompt with an answer for its mask. Of blanks on both sides of the border the prompt's stay: `is <mask>`
    with ` Paris` is `is Paris`, as with `Paris`."""
    before, _, after = prompt.partition(mask_token)
    return before + (answer.lstrip() if before[-1:].isspace() else answer) + after

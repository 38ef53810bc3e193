"""Lines of a training file as examples: `messages`, as OpenAI has them, or `prompt` and `completion`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from service import jsonl
from service.errors import InvalidInput
from service.jobs import MAX_CHOICES, MAX_EXAMPLES, MAX_TURNS, Example, PromptFormat, Text, Turn, invalid_input
from service.strict import Strict


class Message(Strict):
    """One turn of a chat. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    weight: Literal[0, 1] = 1


class Chat(Strict):
    """A line of `messages`. `choices` is ours: the answers that the last message is one of."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    choices: Annotated[list[Text], Field(max_length=MAX_CHOICES)] | None = None


@dataclass(frozen=True)
class TrainingFile:
    """A file's examples."""

    lines: jsonl.JsonLines
    examples: list[Example]
    prompt_format: PromptFormat

    def locate(self, error: InvalidInput, split: str, param: str) -> InvalidInput | None:
        """What is wrong with an example of the split that the file became, told by its line; None for another error.

        Args:
            param: the field that names the file.
        """
        match = jsonl.PARAM.fullmatch(error.param or "")
        if match is None or match[1] != split:
            return None
        index, field = int(match[2]), match[3]
        if self.prompt_format is PromptFormat.CHAT:
            last = len(self.examples[index].chat)
            written = {"prompt": f"messages[{last - 1}].content", "completion": f"messages[{last}].content"}
            field = written.get(field, field)
        as_written = type(error)(error.message, param=f"{split}[{index}].{field}")
        return type(error)(jsonl.locate(as_written, {split: self.lines}).message, param=param)


def read(name: str, content: bytes, param: str) -> TrainingFile:
    """The examples of a file.

    Args:
        name: of the file, for errors.
        param: the field that the file came by.

    Raises:
        InvalidInput: naming the file's line.
    """
    try:
        lines = jsonl.parse(name, content)
        if not lines.objects:
            raise InvalidInput(f"{name}: empty; a line is an example")
        if len(lines.objects) > MAX_EXAMPLES:
            raise InvalidInput(f"{name}: {len(lines.objects):,} lines; at most {MAX_EXAMPLES:,}")
        chats = [isinstance(line, dict) and "messages" in line for line in lines.objects]
        if any(chats) and not all(chats):
            at = lines.lines[chats.index(not chats[0])]
            raise InvalidInput(f"{name}:{at}: either all lines of a file have `messages` or none")
        examples = [_example(line, f"{name}:{at}") for line, at in zip(lines.objects, lines.lines, strict=True)]
    except InvalidInput as error:
        raise InvalidInput(error.message, param=param) from None
    return TrainingFile(lines, examples, PromptFormat.CHAT if chats[0] else PromptFormat.TEXT)


def _example(line: object, place: str) -> Example:
    try:
        if isinstance(line, dict) and "messages" in line:
            chat = Chat.model_validate(line)
            return _of_chat(chat.messages, chat.choices)
        return Example.model_validate(line)
    except ValidationError as error:
        wrong = invalid_input(error)
    except InvalidInput as error:
        wrong = error
    raise InvalidInput(f"{place}: {wrong.param}: {wrong.message}" if wrong.param else f"{place}: {wrong.message}")


def _of_chat(messages: Sequence[Message], choices: list[str] | None) -> Example:
    last = len(messages) - 1
    if messages[last].role != "assistant":
        raise InvalidInput("the last message is the right answer, of role `assistant`", param=f"messages[{last}].role")
    if messages[last].weight == 0:
        raise InvalidInput("the last message is what is learned; 1", param=f"messages[{last}].weight")
    if last == 0 or messages[last - 1].role != "user":
        raise InvalidInput("before the answer stands a message of role `user`", param=f"messages[{max(last - 1, 0)}]")
    before = [
        Turn(role="system" if turn.role == "developer" else turn.role, content=turn.content)
        for turn in messages[: last - 1]
    ]
    prompt, completion = messages[last - 1].content, messages[last].content
    return Example(prompt=prompt, completion=completion, choices=choices, turns=before or None)

"""A model's chat template around a prompt, rendered within bounds.

A template is a program that comes with the model. transformers runs it in Jinja's sandbox, which keeps it from the
machine but lets it take time and memory without end: https://jinja.palletsprojects.com/sandbox.
"""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from service.errors import InvalidInput
from service.jobs import Turn

# Of the processor: a thousand prompts take a second with the longest templates in use.
SECONDS = 5.0
SECONDS_A_PROMPT = 0.01
MEMORY_BYTES = 512 * 2**20
# Of what stands around a prompt, that may be in it a few times.
MAX_ADDED = 100_000
MAX_COPIES = 4


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str: ...


class _TooSlow(BaseException):
    """Not to be caught by what it interrupts."""


def render(tokenizer: ChatTokenizer, chats: Sequence[Sequence[Turn]]) -> list[str]:
    """Each chat, which ends with a user's turn, up to where the answer begins. In a process's main thread only.

    Raises:
        InvalidInput: there is no template, or it fails, takes too long or makes too much of a chat.
    """
    if not tokenizer.chat_template:
        raise _refused("the model's tokenizer has no chat template")
    try:
        with _bounded(SECONDS + SECONDS_A_PROMPT * len(chats)):
            rendered = [
                tokenizer.apply_chat_template(
                    [turn.model_dump() for turn in chat], add_generation_prompt=True, tokenize=False
                )
                for chat in chats
            ]
    except _TooSlow:
        raise _refused(f"the model's chat template takes more than {SECONDS:g} s") from None
    except MemoryError:
        raise _refused(f"the model's chat template takes more than {MEMORY_BYTES / 1e6:.0f} MB of memory") from None
    except Exception as error:
        # What it says may hold the prompt.
        turns = "a user's turn" if all(len(chat) == 1 for chat in chats) else "these turns; some take no system message"
        raise _refused(f"the model's chat template fails on {turns} ({type(error).__name__})") from None
    for chat, text in zip(chats, rendered, strict=True):
        given = sum(len(turn.content) for turn in chat)
        if len(text) > MAX_COPIES * given + MAX_ADDED:
            raise _refused(f"the model's chat template makes {len(text):,} characters of a prompt of {given:,}")
    return rendered


def _refused(what: str) -> InvalidInput:
    return InvalidInput(f"{what}; use `text`", param="prompt_format")


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise `_TooSlow` after so much time of the processor, MemoryError over so much more memory than now."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise _TooSlow

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + MEMORY_BYTES
    handler = signal.signal(signal.SIGVTALRM, ring)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(room, soft), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)

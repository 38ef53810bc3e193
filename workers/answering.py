"""A try: what a job's base and adapted model say to one prompt, in a process of its own as a job.

Both answer greedily, each token the likeliest, and nothing else of a model's `generation_config.json` applies but its
ends: so `exact_match` is measured too. The adapted model is the base with the adapter that the job published, put on
by PEFT; of `compress`, the model that it published.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from redis.exceptions import RedisError
from safetensors.torch import load as load_tensors
from torch import nn
from transformers import GenerationConfig

from service import models
from service.artifacts import ArtifactStore
from service.connections import connect
from service.errors import C2IError, Conflict, InternalError, InvalidInput, NotFound, UnusableModel
from service.goals import Goal
from service.jobs import ArtifactFile, JobSpec, PromptFormat, Turn
from service.lengths import check_room
from service.logs import named
from service.masks import check_prompt
from service.queue import JobQueue
from service.settings import Settings
from service.tokenizer_files import working_tokenizer
from service.tries.queue import Question, TryQueue
from service.workforce import WorkerState
from workers.adaptation import encode_for
from workers.chat import render
from workers.examples import special_prefix
from workers.limits import Terms, Watch
from workers.loading import Checkpoint, load, load_model
from workers.memory import is_out_of_memory

logger = named(__name__)

TERMS = Terms(
    what="try",
    seconds=60,
    quicker="ask for fewer tokens, or send a shorter prompt",
    smaller="send a shorter prompt, or ask for a worker with more memory",
)
# Of an answer: a vocabulary may hold tokens of any length.
MOST_CHARACTERS = 50_000
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Examples of the job whose answers tell how many tokens stand at a mask.
COUNTED_EXAMPLES = 100


class Answers:
    """Tries, as a worker takes them (`workers.tasks.Task`)."""

    label = "try_id"

    def __init__(self, settings: Settings, redis_url: str) -> None:
        """Raises Unavailable where Redis does not answer."""
        redis = connect(redis_url)
        JobQueue(redis, settings.job_ttl).check()
        self.queue = TryQueue(redis)
        self._store = ArtifactStore(settings.artifacts)
        self._settings = settings
        logger.info("answering tries")

    def announce(self, state: WorkerState, at: tuple[str, int] | None) -> None:
        """Nowhere: `/v1/workers` are those who take jobs."""

    def leave(self) -> None:
        """Nowhere, as well."""

    def watch(self, pid: int, try_id: str, attempt: int) -> Watch:
        """A minute, and the memory of a job."""
        return Watch(pid, self._settings, TERMS, lambda: 0)

    def run(self, try_id: str, attempt: int) -> None:
        """Answer and record. What it cannot record, its worker does."""
        try:
            question = self.queue.question(try_id)
            spec = self._store.get_input(question.job_id)
            files = {file.path: file for file in self._store.files(question.job_id, question.job_attempt)}
            model = models.resolve(self._settings.models, spec.model)
            _check_revision(model, self._read(files, "report.json"))
            base = load(model.folder)
            models.check_unchanged(model)
            prompt = encode_prompt(base, spec, model.context_length, question)
            self.queue.answer_base(try_id, attempt, answer(base, prompt, question.max_tokens))
            adapted = self._adapted(base, spec.goal, files)
            self.queue.succeed(try_id, attempt, answer(adapted, prompt, question.max_tokens))
        except RedisError:
            raise
        except Exception as error:
            ours = explain(error)
            if ours is not error:
                logger.exception("the try failed")
            with contextlib.suppress(Conflict, NotFound):
                self.queue.fail(try_id, attempt, ours)
                logger.info("the try failed", code=ours.code, reason=ours.message)

    def _adapted(self, base: Checkpoint, goal: Goal, files: Mapping[str, ArtifactFile]) -> Checkpoint:
        """The job's model: the base with the adapter on it, in place; of `compress` the model that was published."""
        if goal is Goal.IMPROVE:
            put_on_adapter(base.model, *(self._read(files, f"adapter/{name}") for name in ADAPTER))
            return base
        with tempfile.TemporaryDirectory() as folder:
            for path, file in files.items():
                if path.startswith("model/"):
                    self._store.link(file, Path(folder) / path.removeprefix("model/"))
            return replace(base, model=load_model(Path(folder)))

    def clear(self, try_id: str, attempt: int) -> None:
        """It writes no files."""

    def _read(self, files: Mapping[str, ArtifactFile], path: str) -> bytes:
        if path not in files:
            raise NotFound(f"the job published no {path}")
        with self._store.open(files[path]) as stream:
            return stream.read()


def _check_revision(model: models.Model, report: bytes) -> None:
    """Refuse a base that is not the one that the job adapted: its answers would prove nothing."""
    adapted = json.loads(report)["model"]["revision"]
    if adapted != model.revision:
        raise UnusableModel(
            "the model that is installed under this ID now is another than the job adapted; adapt it anew",
            param="model",
        )


def encode_prompt(base: Checkpoint, spec: JobSpec, context: int | None, question: Question) -> list[int]:
    """The prompt in tokens, as the prompts of the job's examples.

    With a masked language model, so many masks stand for its mask as the answers of the examples mostly have tokens.

    Raises:
        InvalidInput: it leaves no room for an answer, or the model cannot take it.
    """
    tokenizer: Any = base.tokenizer
    with working_tokenizer():
        if base.masked:
            check_prompt(question.prompt, tokenizer.mask_token, "prompt")
            tokens = tokenizer([question.prompt], add_special_tokens=True)["input_ids"][0]
            at, masks = tokens.index(tokenizer.mask_token_id), min(_usual_length(base, spec), question.max_tokens)
            tokens[at : at + 1] = [tokenizer.mask_token_id] * masks
            check_room(len(tokens), 0, context)
        else:
            chat = spec.prompt_format is PromptFormat.CHAT
            turns = [*spec.shared_turns, Turn(role="user", content=question.prompt)]
            text = render(tokenizer, [turns])[0] if chat else question.prompt
            bare = tokenizer([text], add_special_tokens=False)["input_ids"][0]
            tokens = [*([] if chat else special_prefix(tokenizer)), *bare]
            check_room(len(tokens), question.max_tokens, context)
    if not tokens or max(tokens) >= base.vocabulary:
        raise InvalidInput("the tokenizer makes nothing of it that the model knows", param="prompt")
    return [int(token) for token in tokens]


def _usual_length(base: Checkpoint, spec: JobSpec) -> int:
    """How many tokens most answers of the job's examples have."""
    encoded = encode_for(
        base, spec.examples[:COUNTED_EXAMPLES], prompt_format=spec.prompt_format, context=None, name="examples"
    )
    return Counter(len(one.continuations[one.gold]) for one in encoded).most_common(1)[0][0]


@torch.no_grad()
def answer(base: Checkpoint, prompt: list[int], max_tokens: int) -> str:
    """What the model puts behind the prompt, up to its end or `max_tokens`, or at its masks."""
    tokenizer, model = cast(Any, base.tokenizer), cast(Any, base.model)
    input_ids = torch.tensor([prompt], device=next(model.parameters()).device)
    attention_mask = torch.ones_like(input_ids)
    if base.masked:
        masks = input_ids[0] == tokenizer.mask_token_id
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        return _text(tokenizer, logits[0, masks].argmax(-1).tolist())
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    # What a `generation_config.json` holds beside its ends is not to apply, and unset fields are filled from there.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    whole = model.generate(input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=max_tokens)[
        0
    ].tolist()
    return _text(tokenizer, whole[len(prompt) :], behind=prompt)


def _text(tokenizer: Any, tokens: list[int], behind: list[int] | None = None) -> str:
    """The text of an answer; behind a prompt, what it adds to that: some tokenizers drop a blank at a beginning."""
    head, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (behind or [], [*(behind or []), *tokens])
    )
    added = whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode(tokens, skip_special_tokens=True)
    return str(added[:MOST_CHARACTERS])


def put_on_adapter(model: nn.Module, config: bytes, weights: bytes) -> None:
    """Put an adapter on a model, in place, as `PeftModel.from_pretrained` does from a folder.

    Args:
        config: `adapter_config.json`.
        weights: `adapter_model.safetensors`.

    Raises:
        InternalError: it is not this model's.
    """
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        # The base is where it is here: peft warns of another name.
        told = {**json.loads(config), "base_model_name_or_path": None}
        put_on = cast(Any, LoraConfig).from_peft_type(**told)
        adapted = get_peft_model(cast(Any, model), put_on).eval()
        loaded: Any = set_peft_model_state_dict(adapted, load_tensors(weights))
    if loaded.unexpected_keys or any("lora_" in name for name in loaded.missing_keys):
        raise InternalError("the job's adapter does not fit its model")


def explain(error: Exception) -> C2IError:
    """An exception of a try in words for its user, which hold no path and nothing of the prompt."""
    if isinstance(error, C2IError):
        return error
    if is_out_of_memory(error):
        return TERMS.out_of_memory("the try needed more memory than its worker has")
    return InternalError("an internal error in the worker; its log has the details under the try's ID")

"""The job contract: the only thing, with `errors`, that service and workers say to each other.

What a client sends (`JobSpec`), what a job looks like from outside (`Job`), what a worker tells while it runs
(`Progress`) and at its end (`JobResult`; in full, `service.reports`). Everything is validated here once, at the edge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, ValidationInfo, field_validator, model_validator

from service.errors import InvalidInput
from service.goals import Goal, Target, check_goal, option_defaults
from service.strategies import OPTIONS, Strategy, StrategyOptions, decomposes
from service.strict import Strict
from service.webhooks.contract import Webhook, WebhookState

MAX_EXAMPLES = 10_000
MAX_CHOICES = 1_000
MAX_TURNS = 100
# A t-score over fewer examples separates nothing from noise.
MIN_EXAMPLES = 8

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")


class Objective(StrEnum):
    """The loss whose gradient is taken. Of an example without choices it is always the likelihood."""

    BOTH = "both"
    """Negative log-likelihood of the completion plus cross-entropy over the choices."""
    CHOICE = "choice"
    """Cross-entropy over the choices' total log-probabilities."""
    COMPLETION = "completion"
    """Negative log-likelihood of the completion's tokens."""


class PromptFormat(StrEnum):
    """How a prompt reaches the model."""

    TEXT = "text"
    """As it is."""
    CHAT = "chat"
    """As a user's turn of the tokenizer's chat template; the completion is the assistant's turn."""


class Quantize(StrEnum):
    """The numbers that the weights are stored in after the search, beside `model/`, in `quantized/`."""

    INT8 = "int8"
    """Eight bits, a scale for each row (torchao). Embeddings and head stay as they are, in 16 bits at most."""
    INT4 = "int4"
    """Four bits, NF4 with a scale for every 64 weights (bitsandbytes). Embeddings and head as with `int8`."""


class Gguf(StrEnum):
    """The numbers of a GGUF file, for llama.cpp and what is built on it: `gguf/model-q8_0.gguf`."""

    F16 = "f16"
    """Sixteen bits."""
    Q8_0 = "q8_0"
    """Eight bits, a scale for every 32 weights; embeddings too."""


class JobStatus(StrEnum):
    """A job's states; the last three are terminal."""

    QUEUED = "queued"
    """Accepted and stored; no worker has it."""
    RUNNING = "running"
    """A worker's child process works on it."""
    CANCELLING = "cancelling"
    """A client asked to stop it; its process is being killed."""
    SUCCEEDED = "succeeded"
    """Verified and published; also when the verdict is that nothing improved."""
    FAILED = "failed"
    """Ended with an error that the record holds."""
    CANCELLED = "cancelled"
    """Stopped on request; nothing was published."""

    @property
    def terminal(self) -> bool:
        """Whether the job will never change again."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class Stage(StrEnum):
    """The stages of an adaptation, in order."""

    LOADING = "loading"
    DECOMPOSING = "decomposing"
    BACKWARD = "backward"
    RANKING = "ranking"
    SEARCHING = "searching"
    VERIFYING = "verifying"
    PUBLISHING = "publishing"


Text = Annotated[str, StringConstraints(strict=True, max_length=1_000_000)]


class Turn(Strict):
    """What was said in a chat before the prompt."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Example(Strict):
    """One prompt with its gold completion and, for a closed task, the options it is one of. For a masked language
    model the prompt holds the mask token once, where the completion belongs."""

    prompt: Text
    """The text that the model continues, to the letter: a blank at its end counts."""
    completion: Text
    """The right continuation, with the blank that it begins with."""
    choices: Annotated[list[Text], Field(max_length=MAX_CHOICES)] | None = None
    """All options, the completion among them; null for an open answer."""
    turns: Annotated[list[Turn], Field(max_length=MAX_TURNS)] | None = None
    """In a chat, what stands before the prompt: a system message, earlier questions and their answers."""

    @property
    def chat(self) -> list[Turn]:
        """The turns up to the answer, the prompt as the last of them."""
        return [*(self.turns or ()), Turn(role="user", content=self.prompt)]


Examples = Annotated[list[Example], Field(max_length=MAX_EXAMPLES)]
MetadataKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(strict=True, max_length=512)]


class Body(Strict):
    """The body of a request, validated from the bytes that came."""

    @classmethod
    def parse_json(cls, body: bytes) -> Self:
        """Validate a body as it came.

        Raises:
            InvalidInput: naming the first field that is wrong, no field where it is not JSON.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise invalid_input(error) from None


class JobSpec(Body):
    """The body of `POST /v1/jobs`.

    `validation` is the selection split and `test` the test split, where the client brings its own. What is not brought
    is split off by `seed`: the test split off a `validation` of 60 or more, all else off `examples`. No model is
    returned whose `Drift` is over `max_drift`.
    """

    model: Annotated[str, StringConstraints(strict=True)]
    """The ID of an installed model."""
    examples: Examples
    """At least eight; no prompt twice with different completions, over all three lists."""
    validation: Examples | None = None
    """Your own selection split; of 60 or more without `test`, half of them become the test split."""
    test: Examples | None = None
    """Your own test split."""
    goal: Goal = Goal.IMPROVE
    """A better model, or a smaller one."""
    target: Target | None = None
    """Of `compress`: how far."""
    strategy: Strategy = Strategy.COMPONENTS
    """Which structures may be removed."""
    strategy_options: StrategyOptions | None = None
    """Those of `strategy`; null for its defaults."""
    passes: Annotated[int, Field(strict=True, ge=1, le=8)] = 1
    """Rounds of backward, ranking and search; the first that gains nothing is the last. Of `compress`: rounds on the
    way to the target, each of which gives a model."""
    objective: Objective = Objective.BOTH
    """The loss."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Of the splits; the same seed gives the same plan."""
    max_drift: Annotated[float, Field(strict=True, gt=0)] | None = None
    """Most that predictions on neutral text may move, in nats a token; null for no bound."""
    prompt_format: PromptFormat = PromptFormat.TEXT
    """Raw text, or a chat's turn."""
    quantize: Quantize | None = None
    """Also store the result in fewer bits, and test it again."""
    gguf: Gguf | None = None
    """Also write the result as one GGUF file."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(default_factory=dict)
    """Up to 16 strings of your own, which the job shows."""
    webhook: Webhook | None = None
    """Who is told of the job's end; refused where the service has webhooks off."""

    @field_validator("strategy_options", mode="before")
    @classmethod
    def _of_the_strategy(cls, value: object, info: ValidationInfo) -> object:
        strategy = info.data.get("strategy")
        if strategy is None:
            return None  # the strategy itself is wrong, and that is told
        if value is None or isinstance(value, OPTIONS[strategy]):
            return value
        defaults = option_defaults(info.data.get("goal", Goal.IMPROVE), strategy)
        try:
            return OPTIONS[strategy].model_validate({**defaults, **value} if isinstance(value, dict) else value)
        except ValidationError as error:
            raise invalid_input(error, "strategy_options") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model_id(self.model)
        check_goal(self.goal, self.target, self.strategy, self.options, self.max_drift)
        check_examples(self)
        return self

    def located(self) -> Iterator[tuple[str, Example]]:
        """Every example with its place, `examples[3]` say."""
        for name, split in (("examples", self.examples), ("validation", self.validation), ("test", self.test)):
            for i, example in enumerate(split or ()):
                yield f"{name}[{i}]", example

    @property
    def shared_turns(self) -> list[Turn]:
        """What stands before the prompt in every one of `examples`; nothing where they differ."""
        first = self.examples[0].turns or []
        return first if all((example.turns or []) == first for example in self.examples) else []

    @property
    def options(self) -> StrategyOptions:
        """The strategy's options, its defaults where the job gives none."""
        return self.strategy_options or OPTIONS[self.strategy].model_validate(option_defaults(self.goal, self.strategy))

    @property
    def models(self) -> int:
        """How many models it writes: of `compress` one a round."""
        return self.passes if self.goal is Goal.COMPRESS else 1

    @property
    def copies(self) -> int:
        """How many models it may write in whatever form, none of them larger than the base: those, one in two factors
        of what `laser` and `c2i` truncate, a quantized one and a GGUF file."""
        factored = self.strategy in (Strategy.LASER, Strategy.C2I)
        return self.models + factored + (self.quantize is not None) + (self.gguf is not None)

    @property
    def decomposes(self) -> bool:
        """Whether the weights' components are needed: `compress` removes them from what is left."""
        return self.goal is Goal.COMPRESS or decomposes(self.options)

    @classmethod
    def parse(cls, data: object) -> Self:
        """Validate a decoded body or file.

        Raises:
            InvalidInput: naming the first field that is wrong.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid_input(error) from None


def invalid_input(error: ValidationError, *within: str) -> InvalidInput:
    """The first of pydantic's findings, as our error: `('examples', 3, 'prompt')` is `examples[3].prompt`.

    Args:
        within: the fields that what was validated lies in.
    """
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = [*within, *(part for part in first["loc"] if part != "[key]")]
    return InvalidInput(first["msg"].removeprefix("Value error, "), param=field_path(location) or None)


def field_path(location: Sequence[int | str]) -> str:
    """`('examples', 3, 'choices', 0)` as a client would write it: `examples[3].choices[0]`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def check_model_id(model: str) -> None:
    """Refuse everything that is not `name` or `owner/name`: a path, a URL, `..`."""
    if not MODEL_ID.fullmatch(model) or ".." in model:
        raise InvalidInput(
            "a model ID is `name` or `owner/name` of letters, digits, `-`, `_` and single dots; "
            "paths and URLs are not accepted. `GET /v1/models` lists what is installed.",
            param="model",
        )


def check_examples(spec: JobSpec) -> None:
    """What a schema cannot say: every rule about examples, each error naming its field."""
    total = len(spec.examples) + len(spec.validation or []) + len(spec.test or [])
    if total > MAX_EXAMPLES:
        raise InvalidInput(
            f"at most {MAX_EXAMPLES:,} examples a job, over all three lists; there are {total:,}",
            param="examples",
        )
    seen: dict[tuple[str, frozenset[str], str], tuple[str, str, str]] = {}
    for name, split in (("examples", spec.examples), ("validation", spec.validation), ("test", spec.test)):
        if split is None:
            continue
        if not split and name != "examples":
            raise InvalidInput("an empty list; leave the field out, and the job makes its own split", param=name)
        for i, example in enumerate(split):
            at = f"{name}[{i}]"
            _check_example(example, at)
            if example.turns and spec.prompt_format is not PromptFormat.CHAT:
                raise InvalidInput(
                    "turns stand before a prompt in a chat; `prompt_format` is `chat`", param=f"{at}.turns"
                )
            key = (example.prompt, frozenset(example.choices or ()), repr(example.turns or []))
            first_at, first_name, completion = seen.setdefault(key, (at, name, example.completion))
            if completion != example.completion:
                raise InvalidInput(
                    f"the prompt is the same as that of {first_at} and the completion another; "
                    "a prompt has one right answer",
                    param=f"{at}.completion",
                )
            if first_name != name:
                raise InvalidInput(
                    f"the same prompt stands in {first_at}; an example that the model was adapted on proves nothing",
                    param=f"{at}.prompt",
                )
    # Last: what is wrong with the examples that are there is the better thing to know first.
    if len(spec.examples) < MIN_EXAMPLES:
        raise InvalidInput(
            f"at least {MIN_EXAMPLES} examples are needed; there are {len(spec.examples)}", param="examples"
        )


def _check_example(example: Example, at: str) -> None:
    if not example.prompt.strip():
        raise InvalidInput("empty; a prompt is the text that the model continues", param=f"{at}.prompt")
    if not example.completion.strip():
        raise InvalidInput("empty; a completion is the right continuation of the prompt", param=f"{at}.completion")
    choices = example.choices
    if choices is None:
        return
    if len(choices) < 2:
        raise InvalidInput(
            f"at least two choices are needed; there {'is one' if choices else 'are none'}. "
            "Leave the field out for an open answer.",
            param=f"{at}.choices",
        )
    seen: dict[str, int] = {}
    for j, choice in enumerate(choices):
        if not choice.strip():
            raise InvalidInput("an empty choice", param=f"{at}.choices[{j}]")
        first = seen.setdefault(choice, j)
        if first != j:
            raise InvalidInput(f"the same choice as choices[{first}]", param=f"{at}.choices[{j}]")
    if example.completion not in seen:
        raise InvalidInput(
            "not one of the example's choices; they are compared to the letter, blanks too",
            param=f"{at}.completion",
        )


class Progress(Strict):
    """Where a running job is. `percent` never falls."""

    stage: Stage | None = None
    percent: Annotated[float, Field(ge=0, le=100)] = 0.0
    eta_seconds: float | None = None
    queue_position: int | None = None


class JobError(Strict):
    """Why a job failed, in words a user can act on."""

    code: str
    message: str
    param: str | None = None
    retryable: bool = False


class Scores(Strict):
    """What a model reached on the test split. `accuracy` is over the choices, null where no example has any."""

    accuracy: float | None
    exact_match: float
    loss: float


class Difference(Strict):
    """Adapted minus base on the same examples: 95 % bootstrap interval; `p` by McNemar's exact test, for a loss by
    the paired t-test."""

    metric: Literal["accuracy", "exact_match", "loss"]
    value: float
    low: float
    high: float
    p: float


class Removed(Strict):
    """How much the adapted model lacks of the base."""

    components: int
    modules: int
    """Weights that are changed."""
    structures: int = 0
    """Heads, neurons, sub-layers, layers and tiles."""
    parameters: int = 0
    """Those of the structures that are of no use any more, each counted once."""

    def of(self, components: int) -> str:
        """`12 of 97,920 components and 3 structures (12,288 parameters)`."""
        of_components = f"{self.components:,} of {components:,} components"
        if not self.structures:
            return of_components
        structures = f"{self.structures:,} structures ({self.parameters:,} parameters)"
        return f"{of_components} and {structures}" if self.components else structures


class Drift(Strict):
    """The side effect: mean KL divergence from base to adapted model on the next-token distributions of task-neutral
    text, in nats a token, over `tokens` positions. Null where the adapted model's logits are not all numbers."""

    value: float | None
    tokens: int

    def __str__(self) -> str:
        """`drift 0.031 nats a token on neutral text`."""
        return f"drift {'unknown' if self.value is None else f'{self.value:.3g}'} nats a token on neutral text"


class JobResult(Strict):
    """The outcome in brief; `report.json` has it in full."""

    improved: bool
    verdict: str
    base: Scores
    adapted: Scores
    difference: Difference
    removed: Removed
    drift: Drift


class Job(Strict):
    """A job as its client sees it: `GET /v1/jobs/{id}`."""

    id: str
    status: JobStatus
    model: str
    goal: Goal = Goal.IMPROVE
    strategy: Strategy
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempt: int = 0
    progress: Progress = Progress()
    result: JobResult | None = None
    error: JobError | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    webhook: WebhookState | None = None


class JobEvent(Strict):
    """One line of a job's history. `id` grows with time."""

    id: str
    created_at: datetime
    kind: Literal["status", "progress", "warning"]
    """`warning`: something of what was asked for is not done as asked."""
    message: str
    status: JobStatus
    progress: Progress


class ArtifactFile(Strict):
    """One published file; `path` is relative to the job, with `/`."""

    path: str
    bytes: int
    sha256: str

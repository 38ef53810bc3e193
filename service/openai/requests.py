"""The body of `POST /v1/fine_tuning/jobs`, and the job that it asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from service.errors import InvalidInput
from service.jobs import Body, JobSpec, MetadataKey, MetadataValue, PromptFormat
from service.openai.examples import TrainingFile
from service.strict import Strict

SETTINGS = (
    "goal",
    "target",
    "strategy",
    "strategy_options",
    "passes",
    "objective",
    "prompt_format",
    "max_drift",
    "quantize",
    "gguf",
)
WITHIN = "method.compress_to_impress"
MAX_PASSES = 8

Count = Annotated[int, Field(strict=True, ge=1)]
FileId = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=100)]
Suffix = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class Hyperparameters(Strict):
    """Those of OpenAI's supervised fine-tuning. An epoch is a pass; the others have no counterpart."""

    n_epochs: Literal["auto"] | Count | None = None
    batch_size: Literal["auto"] | Count | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0)] | None = None


class Supervised(Strict):
    """OpenAI's own method, for scripts that ask for it."""

    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """How to adapt. `compress_to_impress` holds `goal`, `target`, `strategy`, `strategy_options`, `passes`,
    `objective`, `prompt_format`, `max_drift`, `quantize` and `gguf` as `POST /v1/jobs` has them."""

    type: Literal["compress_to_impress", "supervised"]
    compress_to_impress: dict[str, Any] | None = None
    supervised: Supervised | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in ("dpo", "reinforcement"):
            raise ValueError(f"`{kind}` is not offered; `compress_to_impress` or `supervised`")
        return value

    @model_validator(mode="after")
    def _of_its_type(self) -> Self:
        other = self.supervised if self.type == "compress_to_impress" else self.compress_to_impress
        if other is not None:
            raise ValueError(f"settings of another method than its type, which is `{self.type}`")
        return self


class FineTuningRequest(Body):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, StringConstraints(strict=True)]
    training_file: FileId
    validation_file: FileId | None = None
    """Becomes the selection split."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Those of the method `supervised`, where OpenAI had them before there were methods."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] | None = None
    suffix: Suffix | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: Annotated[list[Any], Field(max_length=0)] | None = None
    """None are offered."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("`hyperparameters` stand in `method.supervised`; beside a `method` they mean nothing")
        return self

    def spec(self, training: TrainingFile, validation: TrainingFile | None) -> JobSpec:
        """The job that is asked for.

        Raises:
            InvalidInput: naming the field of this body, and of a file the line.
        """
        given = self._settings()
        if validation is not None and validation.prompt_format is not training.prompt_format:
            raise InvalidInput("`messages` in one file and `prompt` in the other", param="validation_file")
        if given.get("prompt_format", training.prompt_format) != training.prompt_format and (
            training.prompt_format is PromptFormat.CHAT
        ):
            raise InvalidInput("a file of `messages` is a chat; `chat`", param=f"{WITHIN}.prompt_format")
        data = {
            "model": self.model,
            "examples": training.examples,
            "validation": validation.examples if validation else None,
            "seed": self.seed or 0,
            "metadata": self.metadata or {},
            "prompt_format": training.prompt_format,
        }
        return JobSpec.parse({**data, **given})

    def _settings(self) -> Mapping[str, Any]:
        if self.method is not None and self.method.type == "compress_to_impress":
            given = self.method.compress_to_impress or {}
            for name in given:
                if name not in SETTINGS:
                    raise InvalidInput(f"no such setting; there are {', '.join(SETTINGS)}", param=f"{WITHIN}.{name}")
            return given
        epochs = self._hyperparameters.n_epochs
        return {"passes": min(epochs, MAX_PASSES)} if isinstance(epochs, int) else {}

    @property
    def _hyperparameters(self) -> Hyperparameters:
        supervised = self.method.supervised if self.method else None
        return (supervised.hyperparameters if supervised else self.hyperparameters) or Hyperparameters()

    def warnings(self) -> list[str]:
        """What is not done as asked."""
        asked, told = self._hyperparameters, []
        if isinstance(asked.n_epochs, int):
            passes = min(asked.n_epochs, MAX_PASSES)
            told.append(f"n_epochs {asked.n_epochs} became {passes} passes: up to {MAX_PASSES}, fewer where none helps")
        for name in ("batch_size", "learning_rate_multiplier"):
            if getattr(asked, name) not in (None, "auto"):
                told.append(f"{name} is ignored: nothing is trained step by step")
        return told

    def record(self) -> dict[str, str]:
        """What the job's record keeps of it, beside what every job's does."""
        kept = {"training_file": self.training_file, "validation_file": self.validation_file, "suffix": self.suffix}
        return {"openai": json.dumps(kept)}

    def restate(self, error: InvalidInput, training: TrainingFile, validation: TrainingFile | None) -> InvalidInput:
        """What is wrong with a job, by the fields of this body."""
        files = [("examples", "training_file", training), ("validation", "validation_file", validation)]
        for split, param, file in files:
            if file and (located := file.locate(error, split, param)):
                return located
            if error.param == split:
                return type(error)(error.message, param=param)
        if (error.param or "").partition(".")[0].partition("[")[0] in SETTINGS:
            return type(error)(error.message, param=f"{WITHIN}.{error.param}")
        return error

"""What a client asks of a finished job's models, and what it is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints

from service.errors import InvalidInput
from service.jobs import Body, JobError, JobStatus
from service.strict import Strict


class TrySpec(Body):
    """The body of `POST /v1/jobs/{id}/tries`. The prompt reaches the models as those of the job's examples did."""

    prompt: Annotated[str, StringConstraints(strict=True, max_length=100_000)]
    """For a masked language model with its mask once."""
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=256)] = 64
    """Of each answer. A masked language model fills its mask with as many as the job's answers mostly have."""

    @classmethod
    def parse_json(cls, body: bytes) -> Self:
        """Validate a body as it came; its prompt is not empty.

        Raises:
            InvalidInput: naming the first field that is wrong, no field where it is not JSON.
        """
        spec = super().parse_json(body)
        if not spec.prompt.strip():
            raise InvalidInput("empty; a prompt is the text that the models continue", param="prompt")
        return spec


class Answer(Strict):
    """What a model puts behind the prompt, or in the place of its mask, each token the likeliest."""

    text: str


class Try(Strict):
    """A try as its client sees it. The base's answer comes first."""

    id: str
    job_id: str
    status: Literal[JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED]
    created_at: datetime
    base: Answer | None = None
    adapted: Answer | None = None
    error: JobError | None = None

    @property
    def ended(self) -> bool:
        """Whether it will never change again."""
        return JobStatus(self.status).terminal

"""What the API answers beside a job: pages, models, files, an estimate. Its routes and its client share these."""

from __future__ import annotations

from pydantic import BaseModel, Field

from service.jobs import ArtifactFile, Job
from service.strict import Strict


class ErrorDetail(BaseModel):
    """What is wrong, for programs (`code`), for people (`message`), and where (`param`)."""

    code: str
    message: str
    param: str | None


class JobList(BaseModel):
    """One page, newest first. `next` is the `after` of the next one, null on the last."""

    data: list[Job]
    next: str | None


class FileOut(ArtifactFile):
    """A published file and where to get it."""

    url: str


class FileList(BaseModel):
    """The manifest."""

    data: list[FileOut]


class ModelOut(BaseModel):
    """An installed model; where `error` is set, a job with it would be refused for that reason."""

    id: str
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None
    context_length: int | None = None
    chat: bool | None = None
    masked: bool | None = None
    mask_token: str | None = None
    revision: str | None = None
    error: ErrorDetail | None = None


class ModelList(BaseModel):
    """All of them, by ID."""

    data: list[ModelOut]


class Estimate(Strict):
    """What a job would take, from its examples, the model's shapes and a worker's own measure of its speed."""

    seconds: float = Field(description="Of a worker, from start to end; waiting in the queue is not in it.")
    stages: dict[str, float] = Field(description="Seconds by stage.")
    memory_bytes: int = Field(description="Most that the job's process will hold.")
    disk_bytes: int = Field(description="Written and kept: model, adapter and, the first time, decompositions.")
    tokens: int = Field(description="Of all splits, a shared prompt counted once.")
    measured_speed: bool = Field(description="Whether a worker has told its speed; else a server core is assumed.")

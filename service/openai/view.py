"""Our jobs, events and files as OpenAI's clients read them. Times are whole seconds of the epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel

from service.jobs import Job, JobError, JobEvent, JobStatus
from service.openai import results
from service.records import Record
from service.reports import PassReport
from service.uploads import Upload

# Fields of a record that `FineTuningJob.of` reads.
FIELDS = ("settings", "openai", "owner")
# OpenAI knows no state between being told to stop and having stopped; nothing but `cancelled` follows ours.
STATUSES = {status: status.value for status in JobStatus} | {JobStatus.CANCELLING: "cancelled"}
OWNER_OF_ALL = "anyone"

Item = TypeVar("Item", bound="Object")


class Object(BaseModel):
    """What lists hold."""

    id: str


class Page(BaseModel, Generic[Item]):
    """One page of a list; the next begins `after` its `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, found: Sequence[Item], limit: int) -> Self:
        """The first `limit` of what was found, which is one more where there are more."""
        data = list(found[:limit])
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, has_more=len(found) > limit, first_id=first, last_id=last)


class FileObject(Object):
    """An uploaded file, or one that a job has."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"] = "fine-tune"
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, upload: Upload) -> FileObject:
        """An uploaded one."""
        return cls(**upload.model_dump())


class FilePage(Page[FileObject]):
    """One page of files."""


class FileDeleted(BaseModel):
    """What a deletion answers."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobHyperparameters(BaseModel):
    """`n_epochs` are the passes that the job may take."""

    n_epochs: int
    batch_size: None = None
    learning_rate_multiplier: None = None


class FineTuningJob(Object):
    """A job; `GET /v1/jobs/{id}` has the same one in full."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    model: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    """`ft:MODEL:SUFFIX:JOB` once it has succeeded."""
    training_file: str
    validation_file: str | None
    result_files: list[str]
    """`step_metrics.csv`, the adapter as a zip (of `compress` the model), and `report.json`."""
    error: JobError | None
    hyperparameters: JobHyperparameters
    method: dict[str, Any]
    """`compress_to_impress` with the settings in force."""
    seed: int
    metadata: dict[str, str]
    organization_id: str
    """The ID of the key that created it."""
    trained_tokens: None = None
    """Nothing is trained."""
    integrations: list[Any] = []

    @classmethod
    def of(cls, job: Job, record: Record) -> FineTuningJob:
        """
        Args:
            record: `FIELDS` of the job's record.
        """
        settings = json.loads(record.get("settings", "{}"))
        asked = json.loads(record.get("openai", "{}"))
        seed, validation = settings.pop("seed", 0), settings.pop("validation", False)
        succeeded, eta = job.status is JobStatus.SUCCEEDED, job.progress.eta_seconds
        running = job.status is JobStatus.RUNNING
        return cls(
            id=job.id,
            model=job.model,
            status=STATUSES[job.status],  # type: ignore[arg-type]
            created_at=seconds(job.created_at),
            finished_at=seconds(job.finished_at) if job.finished_at else None,
            estimated_finish=int(time.time() + eta) if running and eta is not None else None,
            fine_tuned_model=_name(job, asked) if succeeded else None,
            training_file=asked.get("training_file") or results.file_id(job.id, results.EXAMPLES),
            validation_file=asked.get("validation_file")
            or (results.file_id(job.id, results.VALIDATION) if validation else None),
            result_files=results.results_of(job) if succeeded else [],
            error=job.error,
            hyperparameters=JobHyperparameters(n_epochs=settings.get("passes", 1)),
            method={
                "type": "compress_to_impress",
                "compress_to_impress": {"strategy": job.strategy.value, **settings},
            },
            seed=seed,
            metadata=job.metadata,
            organization_id=record.get("owner") or OWNER_OF_ALL,
        )


class JobPage(Page[FineTuningJob]):
    """One page of jobs."""


def _name(job: Job, asked: dict[str, Any]) -> str:
    return f"ft:{job.model}:{asked.get('suffix') or ''}:{job.id}"


class FineTuningEvent(Object):
    """One line of a job's history."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message"] = "message"
    data: dict[str, Any]
    """Where the job is: `status`, `stage`, `percent`, `eta_seconds`."""

    @classmethod
    def of(cls, event: JobEvent) -> FineTuningEvent:
        """The same event."""
        level: Literal["info", "warn", "error"] = "warn" if event.kind == "warning" else "info"
        return cls(
            id=event.id,
            created_at=seconds(event.created_at),
            level="error" if event.status is JobStatus.FAILED else level,
            message=event.message,
            data={"status": STATUSES[event.status], **event.progress.model_dump(exclude={"queue_position"})},
        )


class EventPage(Page[FineTuningEvent]):
    """One page of events."""


class CheckpointMetrics(BaseModel):
    """After a pass, on the selection split. Nothing is trained, so OpenAI's other metrics have no value."""

    step: int
    valid_loss: float
    full_valid_loss: float
    accuracy: float | None
    """Over the choices; null where no example has any, and after a pass that was not accepted."""
    exact_match: float | None
    accepted: bool
    components: int
    """Removed by this pass."""


class Checkpoint(Object):
    """A pass. What it led to can be named, and only the last one downloaded."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int

    @classmethod
    def of(cls, job: Job, record: Record, one: PassReport) -> Checkpoint:
        """
        Args:
            record: `FIELDS` of the job's record.
        """
        chosen = results.chosen(one)
        return cls(
            id=f"ckpt_{job.id}_{one.number}",
            created_at=seconds(job.finished_at or job.created_at),
            fine_tuned_model_checkpoint=f"{_name(job, json.loads(record.get('openai', '{}')))}:ckpt-step-{one.number}",
            fine_tuning_job_id=job.id,
            metrics=CheckpointMetrics(
                step=one.number,
                valid_loss=one.loss,
                full_valid_loss=one.loss,
                accuracy=chosen.accuracy if chosen else None,
                exact_match=chosen.exact_match if chosen else None,
                accepted=one.accepted,
                components=one.chosen,
            ),
            step_number=one.number,
        )


class CheckpointPage(Page[Checkpoint]):
    """One page of checkpoints."""


def seconds(time: datetime) -> int:
    """As OpenAI tells times."""
    return int(time.timestamp())

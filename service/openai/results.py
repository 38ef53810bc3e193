"""The files that a job has, under IDs made of its own: what it came with and what came of it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence

from pydantic import BaseModel

from service.artifacts import ArtifactStore
from service.goals import Goal
from service.jobs import Example, Job, PromptFormat
from service.reports import Candidate, PassReport

EXAMPLES, VALIDATION = "examples", "validation"
METRICS, ADAPTER, MODEL, REPORT = "metrics", "adapter", "model", "report"
RESULTS = (METRICS, ADAPTER, MODEL, REPORT)
NAMES = {
    EXAMPLES: "examples.jsonl",
    VALIDATION: "validation.jsonl",
    METRICS: "step_metrics.csv",
    ADAPTER: "adapter.zip",
    MODEL: "model.zip",
    REPORT: "report.json",
}
FILE_ID = re.compile(rf"file-(job_[0-9a-z]{{20}})-({'|'.join(NAMES)})")
# OpenAI's columns first; what is not measured here is empty.
COLUMNS = (
    *("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"),
    *("valid_accuracy", "valid_exact_match", "components", "p", "accepted"),
)


def file_id(job_id: str, kind: str) -> str:
    """`file-job_...-adapter`."""
    return f"file-{job_id}-{kind}"


def kinds_of(job: Job) -> tuple[str, ...]:
    """Which files come of a job, scripts' CSV first, since OpenAI has no other."""
    return METRICS, MODEL if job.goal is Goal.COMPRESS else ADAPTER, REPORT


def results_of(job: Job) -> list[str]:
    """Their IDs."""
    return [file_id(job.id, kind) for kind in kinds_of(job)]


def parse_file_id(text: str) -> tuple[str, str] | None:
    """The job and which of its files; None for another ID."""
    match = FILE_ID.fullmatch(text)
    return (match[1], match[2]) if match else None


class _Passes(BaseModel):
    """Of a report, this alone."""

    passes: list[PassReport]


def read_passes(store: ArtifactStore, job: Job) -> list[PassReport]:
    """The passes of a job that has succeeded."""
    with store.open(store.find(job.id, job.attempt, "report.json")) as file:
        return _Passes.model_validate_json(file.read()).passes


def metrics_csv(passes: Sequence[PassReport]) -> bytes:
    """A line for each pass, on the selection split; line 0 is the base model."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    if passes:
        writer.writerow({"step": 0, "valid_loss": passes[0].base_loss})
    for one in passes:
        trial = chosen(one)
        writer.writerow(
            {
                "step": one.number,
                "valid_loss": one.loss,
                "valid_accuracy": trial.accuracy if trial else None,
                "valid_exact_match": trial.exact_match if trial else None,
                "components": one.chosen,
                "p": one.p,
                "accepted": str(one.accepted).lower(),
            }
        )
    return text.getvalue().encode()


def chosen(one: PassReport) -> Candidate | None:
    """The candidate that a pass took; None where it took none."""
    taken = (trial for trial in one.candidates if one.accepted and trial.loss is not None)
    return next((trial for trial in taken if math.isclose(trial.loss or 0.0, one.loss, rel_tol=1e-9)), None)


def jsonl(examples: Sequence[Example], prompt_format: PromptFormat) -> bytes:
    """Examples as a file that makes the same job."""
    return b"".join(_line(example, chat=prompt_format is PromptFormat.CHAT) for example in examples)


def _line(example: Example, *, chat: bool) -> bytes:
    line = example.model_dump(exclude_none=True)
    if chat:
        before = line.pop("turns", [])
        question = {"role": "user", "content": line.pop("prompt")}
        line = {"messages": [*before, question, {"role": "assistant", "content": line.pop("completion")}], **line}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"

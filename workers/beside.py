"""What is shipped beside `adapter/` and `model/`: the model in fewer bits, as a GGUF file, and how fast each is.

By then an hour's work may be done and verified. What fails here is told in the report and fails no job.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.artifacts import disk_is_full
from service.errors import C2IError, InvalidInput
from service.goals import Goal
from service.jobs import Gguf, JobSpec, Stage
from service.logs import named
from service.reports import CurvePoint, GgufFile, Quantized, Speeds
from service.strategies import HeadsOptions, MixedOptions
from workers import gguf_files, quantizing
from workers.evaluation import evaluate
from workers.loading import Checkpoint
from workers.memory import is_out_of_memory
from workers.progress import Progress
from workers.ranking import Plan
from workers.speed import measure, weight_bytes
from workers.splits import Splits
from workers.subject import Subject

logger = named(__name__)

# A smaller model's speed is that of Python: it is not measured.
FEWEST_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What there is, for the report."""

    quantized: Quantized | None = None
    not_quantized: str | None = None
    """Why there is no such, where the job asked for it."""
    gguf: GgufFile | None = None
    not_gguf: str | None = None
    speed: Speeds | None = None
    curve: list[CurvePoint]
    """The points of `compress`, with their speeds."""
    unseen: bool
    """Whether the quantized model was tested on examples that it was not made from."""

    @property
    def sentence(self) -> str:
        """What the verdict says of it."""
        told = [quantizing.tell(self.quantized, unseen=self.unseen)] if self.quantized else []
        told += [f"It is not quantized: {self.not_quantized}."] if self.not_quantized else []
        told += [f"There is no GGUF file: {self.not_gguf}."] if self.not_gguf else []
        return " ".join(told)


def check_beside(spec: JobSpec, base: Checkpoint) -> None:
    """See, before any work, that what the job asks for beside the model can be made of it.

    Raises:
        InvalidInput: naming the field.
    """
    if spec.quantize:
        quantizing.check_quantizable(base.model, spec.quantize)
    if spec.gguf:
        gguf_files.check_gguf(base.folder)
        config: Any = base.model.config
        if _loses_heads(spec) and config.model_type == "qwen2":
            raise InvalidInput(
                "with fewer heads a Qwen2 has another size of them than transformers reads from a GGUF file; leave it "
                "out, or take layers or neurons",
                param="gguf",
            )


def _loses_heads(spec: JobSpec) -> bool:
    """Whether what is written may have fewer heads than the base."""
    options = spec.options
    groups = isinstance(options, HeadsOptions) or (isinstance(options, MixedOptions) and "groups" in options.kinds)
    return spec.goal is Goal.COMPRESS and groups


def ship_beside(
    spec: JobSpec,
    base: Path,
    out: Path,
    subject: Subject,
    plan: Plan,
    splits: Splits,
    points: list[CurvePoint],
    progress: Progress,
) -> Beside:
    """Write what the job asked for beside `model/`, and measure what is smaller than the base.

    Args:
        base: the base model's folder.
        out: holds `model/`.
        splits: what is quantized is tested on the test split; on all examples, where there is none.
        points: of `compress`, as yet without their speeds.
    """
    quantized, not_quantized = None, None
    if spec.quantize:
        progress.tell(Stage.PUBLISHING, 0.3, f"quantizing to {spec.quantize}")
        examples = splits.test or splits.pool
        try:
            with subject.without(plan):
                before = evaluate(subject.model, examples, subject.objective, subject.layout)
            quantized = quantizing.ship(out, base, spec.quantize, subject, examples, before, spec.seed)
        except Exception as error:
            not_quantized = _explain(error)
            shutil.rmtree(out / "quantized", ignore_errors=True)
            progress.tell(Stage.PUBLISHING, 0.4, f"not quantized: {not_quantized}")
    file, not_gguf = None, None
    if spec.gguf:
        progress.tell(Stage.PUBLISHING, 0.5, "writing the GGUF file")
        try:
            file = _gguf(out, spec.gguf)
        except Exception as error:
            not_gguf = _explain(error)
            shutil.rmtree(out / "gguf", ignore_errors=True)
            progress.tell(Stage.PUBLISHING, 0.6, f"no GGUF file: {not_gguf}")
    speed = None
    smaller = quantized or weight_bytes(out / "model") < weight_bytes(base)
    if smaller and weight_bytes(base) >= FEWEST_BYTES:
        progress.tell(Stage.PUBLISHING, 0.7, "measuring speed and memory")
        speed, points = _speeds(base, out, points, quantized=quantized is not None)
    return Beside(
        quantized=quantized,
        not_quantized=not_quantized,
        gguf=file,
        not_gguf=not_gguf,
        speed=speed,
        curve=points,
        unseen=bool(splits.test),
    )


def _gguf(out: Path, kind: Gguf) -> GgufFile:
    path = f"gguf/model-{kind}.gguf"
    gguf_files.write_gguf(out / "model", out / path, kind)
    return GgufFile(kind=kind, path=path, bytes=(out / path).stat().st_size)


def _speeds(
    base: Path, out: Path, points: list[CurvePoint], *, quantized: bool
) -> tuple[Speeds | None, list[CurvePoint]]:
    """Of all checkpoints there are; the points of a curve with theirs, of which the last is `model/`."""
    folders = [base, out / "model", *([out / "quantized"] if quantized else [])]
    try:
        found = measure([*folders, *(out / point.path for point in points[:-1])])
    except Exception as error:
        _explain(error)
        return None, points
    speeds = [*found[len(folders) :], found[1]] if points else []
    told = [point.model_copy(update={"speed": speed}) for point, speed in zip(points, speeds, strict=True)]
    return Speeds(base=found[0], model=found[1], quantized=found[2] if quantized else None), told


def _explain(error: Exception) -> str:
    """Why, for the job's user; the rest for the worker's log."""
    logger.warning("an artifact beside the model could not be made", exc_info=error)
    if isinstance(error, C2IError):
        return error.message
    if disk_is_full(error):
        return "the worker's disk is full"
    if is_out_of_memory(error):
        return "it needed more memory than the worker has"
    return f"the library that does it failed ({type(error).__name__})"

"""A worker process whose adaptation does what the job's metadata says: block, crash, run out of memory, publish.

Everything else of it is real. `python -m tests.stand_in DATA`, with REDIS_URL set.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

from service import logs, report_page
from service.errors import UnusableModel
from service.jobs import Difference, Drift, JobSpec, Removed, Stage
from service.models import Model
from service.reports import Cost, Metrics, ModelInfo, Outlook, Report, SplitSizes, Verification
from service.settings import Settings
from workers.machine import Machine
from workers.progress import OnProgress
from workers.worker import work


def adapt(spec: JobSpec, model: Model, out: Path, *, cache: Path, on_progress: OnProgress) -> Report:
    """Begin as a real adaptation does, then behave as told."""
    on_progress(Stage.LOADING, 1.0, 60.0, "reading the model")
    (out / "adapter").mkdir()
    (out / "adapter" / "half-written.safetensors").write_bytes(b"half")
    match spec.metadata.get("do", "publish"):
        case "block":
            subprocess.Popen(["sleep", "1000"])  # a process of the job's own, which must go with it
            on_progress(Stage.SEARCHING, 50.0, 30.0, "blocked")
            threading.Event().wait()
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "memory":
            raise MemoryError
        case "eat":
            eaten = [b"x" * 20_000_000 for _ in range(100) if not threading.Event().wait(0.02)]
            raise AssertionError(f"{len(eaten)} pieces of memory were to be had")
        case "fill":
            for k in range(2000):
                (out / f"{k}").write_bytes(bytes(1_000_000))
                threading.Event().wait(0.01)
        case "grow":
            with (out / "file").open("wb") as file:
                for _ in range(2000):
                    file.write(bytes(1_000_000))
        case "fork":
            for k in range(80):
                subprocess.Popen(["sleep", "1000"], start_new_session=k % 2 == 0)
            threading.Event().wait()
        case "noise":
            while True:
                print("noise", "x" * 100)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            on_progress(Stage.SEARCHING, 50.0, 30.0, "blocked")
            threading.Event().wait()
        case "slow":  # ends a second after it is seen at work
            on_progress(Stage.SEARCHING, 50.0, 1.0, "at work")
            threading.Event().wait(1)
        case "factor":
            (out / "factored").mkdir()
            (out / "factored" / "load_factored.py").write_text("pass")
        case "bug":
            raise RuntimeError(f"secret {spec.examples[0].prompt} in {out}")
        case "tell":
            tell(f"{spec.examples[0].prompt} in {out}")
        case "refuse":
            raise UnusableModel("its blocks hold no matrices", param="model")
        case "once":  # blocks in the first attempt
            marker = cache / "began"
            if not marker.exists():
                cache.mkdir(exist_ok=True)
                marker.touch()
                on_progress(Stage.SEARCHING, 50.0, 30.0, "blocked")
                threading.Event().wait()
    (out / "adapter" / "half-written.safetensors").unlink()
    (out / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (out / "adapter" / "adapter_config.json").write_text("{}")
    (out / "model").mkdir()
    (out / "model" / "model.safetensors").write_bytes(b"weights" * 100_000)
    if spec.quantize:
        (out / "quantized").mkdir()
        (out / "quantized" / "model.safetensors").write_bytes(b"fewer")
    report = make_report(spec)
    (out / "report.html").write_text(report_page.render(report))
    (out / "report.json").write_text(report.model_dump_json())
    on_progress(Stage.PUBLISHING, 99.0, 0.0, "publishing")
    return report


def tell(secret: str) -> None:
    """Give away a text in every way that a package has."""
    print(secret)
    os.write(2, secret.encode())
    warnings.warn(secret, stacklevel=1)
    logging.getLogger("transformers").error(secret)
    logging.getLogger("rq.worker").error("failed: %s", RuntimeError(secret))
    logging.getLogger("uvicorn.error").error("failed\n%s", secret)

    def fail() -> None:
        raise RuntimeError(secret)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except RuntimeError as error:
        raise KeyError(secret) from error


def make_report(spec: JobSpec) -> Report:
    """A report that says little and is valid."""
    metrics = Metrics(
        accuracy=0.5,
        accuracy_interval=(0.15, 0.85),
        exact_match=0.5,
        exact_match_interval=(0.15, 0.85),
        loss=1.0,
        n=4,
        balanced_accuracy=0.5,
        majority_rate=0.5,
        confusion=None,
    )
    difference = Difference(metric="accuracy", value=0.0, low=-0.1, high=0.1, p=1.0)
    return Report(
        improved=False,
        verdict="no significant improvement",
        base=metrics,
        adapted=metrics,
        difference=difference,
        removed=Removed(components=0, modules=0),
        drift=Drift(value=0.0, tokens=1),
        model=ModelInfo(
            id=spec.model,
            revision="0",
            architecture="Tiny",
            dtype="float32",
            parameters=1,
            target_modules=1,
            components=1,
        ),
        strategy=spec.strategy,
        objective=spec.objective,
        prompt_format=spec.prompt_format,
        seed=spec.seed,
        passes_requested=spec.passes,
        splits=SplitSizes(gradient=4, selection=4, test=4),
        after_first_pass=metrics,
        differences=[difference],
        first_pass_differences=[difference],
        first_pass_drift=None,
        max_drift=None,
        passes=[],
        outlook=Outlook(still_falling=False, next_pass_seconds=0.0, message=""),
        gained=0,
        lost=0,
        changed=[],
        plan=[],
        modules=[],
        skipped_modules=[],
        verification=Verification(adapter=0.0, model=0.0),
        rounding_loss=None,
        cost=Cost(
            stages={},
            fb_seconds=1.0,
            adaptation_fb=1.0,
            stages_fb={},
            peak_memory_bytes=1,
            adapter_bytes=1,
            model_bytes=1,
        ),
        versions={},
    )


if __name__ == "__main__":
    settings = Settings(data=Path(sys.argv[1]))
    logs.configure(settings.log_level)
    work(settings, os.environ["REDIS_URL"], adapt, lambda: Machine("cpu", 1, 10.0))

"""How fast the service is: `python -m tests.load`, beside what a bare FastAPI route reaches in the same run.

The service is `c2i serve` as a user starts it, with its embedded Redis (append-only file, synced at every write), on
loopback and on the same cores as what asks it; no workers run, so that nothing else computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from redis import Redis

from service.artifacts import ArtifactStore
from service.connections import connect, socket_url
from service.embedded import socket_path
from service.jobs import JobSpec
from service.queue import JobQueue
from service.settings import Settings
from tests import tiny
from tests.live import REPOSITORY, ServeProcess, install
from tests.load.bare import KEY
from tests.load.generators import Rate, at_rate, download, listeners, wrk
from tests.stand_in import make_report

ARTIFACT_BYTES = 1_000_000_000
EXAMPLES = 100
LISTENERS = 200
# What the service is told beyond its defaults: no limit of a caller is to be measured here, however long the run.
ENVIRONMENT = {"C2I_MAX_REQUESTS_PER_SECOND": "0", "C2I_MAX_WAITING_JOBS": "1000000"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    asked: str
    measured: str
    bare: str
    reached: bool
    figures: dict[str, Any]


class Rig:
    """The service, the bare application beside it on the same Redis, and a job of each kind."""

    def __init__(self, folder: Path, stack: ExitStack, artifact_bytes: int) -> None:
        self.settings = Settings(data=folder / "data", workers=0)
        install(tiny.build("llama", folder / "model"), self.settings.data)
        log = stack.enter_context((folder / "log").open("wb"))
        self.server = ServeProcess(self.settings.data, "--workers", "0", env=ENVIRONMENT, log=log)
        stack.callback(self.server.stop)
        self.api = psutil.Process(self.server.process.pid)
        redis_url = socket_url(str(socket_path(self.settings.data)))
        self.redis: Redis = connect(redis_url)
        stack.callback(self.redis.close)
        self.redis.set(KEY, "x" * 500)
        self.body = folder / "body.json"
        self.body.write_text(json.dumps(_body()))
        self.queued = self._submit()
        self.finished, artifact = self._finish(self._submit(), artifact_bytes)
        self.bare = self._start_bare(redis_url, artifact, stack)

    def url(self, job_id: str, path: str = "") -> str:
        """Of a job."""
        return f"{self.server.url}/v1/jobs/{job_id}{path}"

    def _submit(self) -> str:
        body = self.body.read_text().replace("@", "0")
        response = self.server.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        response.raise_for_status()
        return str(response.json()["id"])

    def _finish(self, job_id: str, size: int) -> tuple[str, Path]:
        """As a worker does; the job and its large artifact."""
        queue = JobQueue(self.redis, self.settings.job_ttl)
        store = ArtifactStore(self.settings.artifacts)
        spec = JobSpec.parse(_body())
        attempt = queue.start(job_id)
        report = make_report(spec)
        with store.workspace(job_id, attempt) as out:
            (out / "model").mkdir()
            with (out / "model" / "model.safetensors").open("wb") as file:
                for _ in range(size // 1_000_000):
                    file.write(os.urandom(1_000_000))
            (out / "report.json").write_text(report.model_dump_json())
            store.publish(job_id, attempt, out)
        queue.succeed(job_id, attempt, report.brief())
        with store.open(store.find(job_id, attempt, "model/model.safetensors")) as artifact:
            return job_id, Path(artifact.name)

    def _start_bare(self, redis_url: str, artifact: Path, stack: ExitStack) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.load.bare", str(artifact)],
            cwd=REPOSITORY,
            env={**os.environ, "REDIS_URL": redis_url},
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        if process.stdout is None:
            raise RuntimeError("no pipe")
        stack.callback(process.stdout.close)
        self.bare_process = psutil.Process(process.pid)
        return process.stdout.readline().strip()


def _body() -> dict[str, Any]:
    """100 examples of a closed task, some 20 kB; `@` is a number of the request's own."""
    answers = [" positive", " negative"]
    review = "It began well enough and then went on for longer than anybody in the room would have liked, me included"
    return {
        "model": "tiny-llama",
        "examples": [
            {"prompt": f"Review {i}.@: {review}.\nSentiment:", "completion": answers[i % 2], "choices": answers}
            for i in range(EXAMPLES)
        ],
    }


def measure(rig: Rig, seconds: float) -> Iterator[Row]:
    """The table, line by line, each beside its own measure of the bare application."""
    for kind, job_id in (("queued", rig.queued), ("finished", rig.finished)):
        bare = _cost(rig.bare_process, lambda: wrk(rig.bare, seconds))
        ours = _cost(rig.api, lambda job_id=job_id: wrk(rig.url(job_id), seconds))  # type: ignore[misc]
        yield _many(f"status reads of a {kind} job", 1_000, ours, bare)

    slow, rate = at_rate(rig.bare, 500, seconds), at_rate(rig.url(rig.queued), 500, seconds)
    reached = rate.p99 < 50 and not rate.failed
    figures = {"ours": rate, "bare": slow}
    yield Row("p99 at 500 status reads a second", "50 ms", _latency(rate), _latency(slow), reached, figures)

    submit = f"{rig.server.url}/v1/jobs"
    bare = _cost(rig.bare_process, lambda: wrk(rig.bare, seconds))
    ours = _cost(rig.api, lambda: wrk(submit, seconds, "submit.lua", str(rig.body)))
    yield _many(f"submissions of {EXAMPLES} examples", 200, ours, bare)

    for path in ("/files/model/model.safetensors", "/model.zip"):
        yield _downloads(rig, path)
    yield _listening(rig, 2 * seconds)


def _downloads(rig: Rig, path: str) -> Row:
    bare = download(f"{rig.bare}/file")
    with _sampled(rig.api) as memory:
        speed = download(rig.url(rig.finished, path))
    before, most = memory[0], max(memory)
    return Row(
        f"download of 1 GB, {path.rpartition('/')[2]}",
        "300 MB/s, memory constant",
        f"{speed / 1e6:,.0f} MB/s, memory {before / 1e6:,.0f} MB before and {most / 1e6:,.0f} MB at most",
        f"{bare / 1e6:,.0f} MB/s",
        speed > 300e6 and most - before < 20e6,
        {"bytes_per_second": speed, "bare": bare, "memory_before": before, "memory_most": most},
    )


def _listening(rig: Rig, seconds: float) -> Row:
    idle = _busy(rig.api, seconds)
    with listeners(rig.url(rig.queued, "/events"), LISTENERS):
        share = _busy(rig.api, seconds)
    return Row(
        f"{LISTENERS} listeners on a silent job",
        "5 % of a core",
        f"{share:.1%} of a core; without listeners {idle:.1%}",
        "",
        share < 0.05,
        {"cores": share, "without": idle, "seconds": seconds},
    )


def _cost(process: psutil.Process, run: Callable[[], Rate]) -> tuple[Rate, float]:
    """A rate, and the processor's seconds that the process spent on an answer: these depend less on who else runs."""
    before = _cpu_seconds(process)
    rate = run()
    return rate, (_cpu_seconds(process) - before) / max(1, rate.answers)


def _busy(process: psutil.Process, seconds: float) -> float:
    """Cores that the process keeps busy."""
    before = _cpu_seconds(process)
    threading.Event().wait(seconds)
    return (_cpu_seconds(process) - before) / seconds


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _many(what: str, asked: int, ours: tuple[Rate, float], bare: tuple[Rate, float]) -> Row:
    def say(rate: Rate, cost: float) -> str:
        failed = f", {rate.failed} failed" if rate.failed else ""
        return f"{rate.per_second:,.0f}/s at {cost * 1e3:.2f} ms of CPU{failed}"

    reached = ours[0].per_second >= asked and not ours[0].failed
    figures = {"ours": ours[0], "cpu_seconds": ours[1], "bare": bare[0], "bare_cpu_seconds": bare[1]}
    return Row(what, f"{asked:,}/s", say(*ours), say(*bare), reached, figures)


def _latency(rate: Rate) -> str:
    failed = f", {rate.failed} failed" if rate.failed else ""
    return (
        f"p99 {rate.p99:.1f} ms, p50 {rate.p50:.1f} ms, longest {rate.longest:.0f} ms, {rate.per_second:.0f}/s{failed}"
    )


@contextmanager
def _sampled(process: psutil.Process) -> Iterator[list[int]]:
    """The process's memory in bytes, before and every 20 ms meanwhile."""
    samples = [process.memory_info().rss]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def _markdown(rows: list[Row], about: dict[str, Any]) -> str:
    lines = [
        "# Speed of the service",
        "",
        f"{about['date']}, {about['processor']}, {about['cores']} cores, shared with what asks; "
        f"load before the run {about['load']}. Settings beyond the defaults: {about['settings']}.",
        "*Bare* is a FastAPI route with one Redis GET in the same run; for downloads, with a FileResponse.",
        "",
        "| what | asked | measured | bare | |",
        "|---|---|---|---|---|",
        *(f"| {r.what} | {r.asked} | {r.measured} | {r.bare} | {'yes' if r.reached else 'no'} |" for r in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table, write it as Markdown and JSON; 1 where something that was asked for is not reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="how long each load lasts (10)")
    parser.add_argument("--bytes", type=int, default=ARTIFACT_BYTES, help="size of the artifact (1 GB)")
    parser.add_argument("--out", type=Path, help="a file for JSON; the table goes beside it as .md")
    given = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed: apt-get install wrk")
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "seconds": given.seconds,
        "settings": ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()) or "none",
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        rig = Rig(Path(folder), stack, given.bytes)
        for row in measure(rig, given.seconds):
            print(f"{row.what}: {row.measured}; asked {row.asked}; bare {row.bare}", file=sys.stderr, flush=True)
            rows.append(row)
    print(_markdown(rows, about))
    if given.out:
        given.out.write_text(json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(_markdown(rows, about))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

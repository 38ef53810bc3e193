"""Rounds: jobs, a blow, everything to its end, and all checks; and the table of what came of it."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from tests.chaos.blow import Blow, Impossible
from tests.chaos.faults import FAULTS
from tests.chaos.invariants import Checks
from tests.chaos.world import END_SECONDS, TERMINAL, World
from tests.live import wait_until

# What the service promises after a kill.
BOUND_SECONDS = 30.0
# Worlds that run.
OPEN: list[World] = []


@dataclass
class Round:
    """What came of one blow."""

    number: int
    kind: str
    jobs: int = 0
    recovery: float | None = None
    """Seconds until the API said that it can work and every job that was hit had begun again or ended."""
    lost: int = 0
    """Jobs that were accepted and did not end as they may."""
    doubled: int = 0
    """Jobs that two processes worked on at one time."""
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def slow(self) -> bool:
        """Whether recovery took longer than promised."""
        return self.recovery is not None and self.recovery > BOUND_SECONDS


def run_rounds(world: World, kinds: Sequence[tuple[int, str]], seed: int, tell: Callable[[Round], None]) -> list[Round]:
    """Rounds of these numbers and kinds on one world; each is seeded by its number."""
    checks = Checks(world)
    rounds = []
    for number, kind in kinds:
        rng = random.Random(f"{seed} {number}")
        result = Round(number, kind)
        try:
            _round(world, checks, rng, result)
        except Impossible as reason:
            result.skipped = str(reason)
        except Exception:
            result.problems.append(traceback.format_exc())
        if any("Traceback" in problem for problem in result.problems):
            world.revive()
            world.jobs = []
        rounds.append(result)
        tell(result)
    return rounds


def _round(world: World, checks: Checks, rng: random.Random, result: Round) -> None:
    for _ in range(rng.randint(1, 3)):
        world.submit(rng)
    wait_until(world.at_work, END_SECONDS, "a job is at work")
    threading.Event().wait(rng.uniform(0, 3))
    blow = FAULTS[result.kind](world, rng)
    result.problems += blow.problems
    result.recovery = _await_recovery(world, blow)
    world.await_ends()
    result.jobs = len(world.jobs)
    found = checks.of_jobs()
    result.lost = sum(not problem.startswith("two processes") for problem in found)
    result.doubled = len(found) - result.lost
    result.problems += found + _check_spared(world, blow) + checks.of_rest() + checks.forget_jobs()


def _await_recovery(world: World, blow: Blow) -> float:
    deadline = time.monotonic() + END_SECONDS
    ready_at = 0.0
    while not ready_at:
        ready_at = time.time() if world.ready() else 0.0
        if time.monotonic() > deadline:
            raise AssertionError("the API is not ready")
        threading.Event().wait(0.05)
    times = [ready_at]
    for job_id, attempt in blow.hit.items():
        while (at := _went_on(world, job_id, attempt)) is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{job_id} does not go on after attempt {attempt}: {world.job(job_id)}")
            threading.Event().wait(0.1)
        times.append(at)
    return max(0.0, max(times) - blow.at)


def _went_on(world: World, job_id: str, attempt: int) -> float | None:
    """When a job began again after an attempt, or ended."""
    events = world.events(job_id)
    if not events and world.job(job_id) is None:
        return time.time()
    for event in events:
        began_again = event["message"] == f"attempt {attempt + 1} began"
        if event["kind"] == "status" and (began_again or event["status"] in TERMINAL):
            return datetime.fromisoformat(event["created_at"]).timestamp()
    return None


def _check_spared(world: World, blow: Blow) -> list[str]:
    attempts = {job_id: (world.job(job_id) or {}).get("attempt") for job_id in blow.spared}
    return [
        f"{job_id} was in attempt {before} and needed attempt {attempts[job_id]}"
        for job_id, before in blow.spared.items()
        if attempts[job_id] != before
    ]


def deal(rounds: int, kinds: Sequence[str], seed: int) -> list[tuple[int, str]]:
    """Which round is of which kind: each kind equally often, in a random order."""
    rng = random.Random(seed)
    dealt: list[str] = []
    while len(dealt) < rounds:
        dealt += rng.sample(kinds, len(kinds))
    return list(enumerate(dealt[:rounds], 1))


def run(rounds: int, seed: int, parallel: int, kinds: Sequence[str], tell: Callable[[Round], None]) -> list[Round]:
    """All rounds, on so many worlds at once."""
    from tests import tiny
    from tests.chaos.world import WIDTH

    dealt = deal(rounds, kinds, seed)
    with tempfile.TemporaryDirectory(prefix="c2i-chaos-") as folder:
        model = tiny.build("llama", Path(folder) / "model", shape={"intermediate_size": WIDTH})

        def one(index: int) -> list[Round]:
            world = World(Path(folder) / str(index), model)
            OPEN.append(world)
            try:
                world.start()
                return run_rounds(world, dealt[index::parallel], seed, tell)
            finally:
                OPEN.remove(world)
                world.close()

        with ThreadPoolExecutor(parallel) as pool:
            return sorted(
                (result for some in pool.map(one, range(parallel)) for result in some), key=lambda r: r.number
            )


def table(rounds: Sequence[Round]) -> str:
    """In Markdown: a line a kind."""
    heads = ["fault", "count", "recovered", "jobs", "lost", "run twice at once"]
    heads += ["recovery, median", "worst", f"over {BOUND_SECONDS:.0f} s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    kinds = [kind for kind in FAULTS if any(result.kind == kind for result in rounds)]
    for kind in [*kinds, "all"]:
        of_kind = [result for result in rounds if kind in (result.kind, "all")]
        struck = [result for result in of_kind if not result.skipped]
        cells = [kind.replace("_", " "), *(_figures(struck) if struck else [f"skipped: {of_kind[0].skipped}"])]
        lines.append(f"| {' | '.join(cells)} |" + " |" * (len(heads) - len(cells)))
    return "\n".join(lines) + "\n"


def _figures(rounds: Sequence[Round]) -> list[str]:
    times = [result.recovery for result in rounds if result.recovery is not None]
    counts = [
        len(rounds),
        sum(not result.problems for result in rounds),
        sum(result.jobs for result in rounds),
        sum(result.lost for result in rounds),
        sum(result.doubled for result in rounds),
    ]
    seconds = [f"{statistics.median(times):.1f} s", f"{max(times):.1f} s"] if times else ["", ""]
    return [*map(str, counts), *seconds, str(sum(result.slow for result in rounds))]


def write(rounds: Sequence[Round], out: Path, about: dict[str, object]) -> None:
    """The rounds as JSON and the table as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "faults.json").write_text(
        json.dumps({**about, "rounds": [asdict(result) for result in rounds]}, indent=1) + "\n"
    )
    (out / "faults.md").write_text(table(rounds))

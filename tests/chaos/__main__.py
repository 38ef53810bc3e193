"""`python -m tests.chaos --rounds 200 --seed 1`: exit code 1 where anything was wrong."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from tests.chaos.faults import FAULTS
from tests.chaos.run import OPEN, Round, run, table, write


def main() -> int:
    """Run, tell of each round, write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="blows; 200 for a record")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice; the moments are the machine's own")
    parser.add_argument("--parallel", type=int, default=1, help="services at once")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="names of faults, by commas; all, if not given")
    parser.add_argument("--out", type=Path, help="folder for faults.json and faults.md")
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    if unknown := set(kinds) - FAULTS.keys():
        parser.error(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _break_off)
    began = time.monotonic()
    rounds = run(given.rounds, given.seed, given.parallel, kinds, _tell)
    about = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": given.seed,
        "parallel": given.parallel,
        "seconds": round(time.monotonic() - began),
    }
    sys.stdout.write("\n" + table(rounds))
    if given.out:
        write(rounds, given.out, about)
    return int(any(result.problems or result.slow for result in rounds))


def _break_off(number: int, _: object) -> NoReturn:
    """Leave nothing behind: no process, no mounted disk, no folder."""
    for world in list(OPEN):
        world.close()
        shutil.rmtree(world.folder.parent, ignore_errors=True)
    os._exit(128 + number)


def _tell(result: Round) -> None:
    took = f"{result.recovery:.1f} s" if result.recovery is not None else ""
    state = (
        f"skipped: {result.skipped}"
        if result.skipped
        else "WRONG"
        if result.problems
        else "slow"
        if result.slow
        else "well"
    )
    sys.stdout.write(f"{result.number:4} {result.kind:24} {result.jobs} jobs {took:>8}  {state}\n")
    for problem in result.problems:
        sys.stdout.write(f"     {problem}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

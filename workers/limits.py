"""What a job may take: time, memory, disk, processes, output. Watched from outside, by the worker that forked it.

A watch ends a job within a second of the breach and names it, whatever its code does. In between, the kernel stands
behind: a process of a job is the first that it ends where the machine's memory is out, and no file of it grows past
the quota.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service import logs
from service.errors import C2IError, InternalError, OutOfDisk, OutOfMemory, TimedOut
from service.settings import Settings

logger = logs.named(__name__)

# Processes and files are counted no more often.
COUNT_SECONDS = 1.0
# An adaptation starts one for each checkpoint whose speed it measures.
MAX_PROCESSES = 64
# What does not end within this is in the kernel's hands: a disk that hangs.
END_SECONDS = 5.0
# Of a job's log, or of what it prints: more is a fault, and is dropped.
MAX_OUTPUT_BYTES = 1_000_000
# As much as a pipe holds, so that one read empties it.
PIPE_BYTES = 65_536


@dataclass(frozen=True)
class Terms:
    """How long an attempt may run, and how its user is told that it took too much."""

    what: str = "job"
    seconds: int = 86_400
    quicker: str = "send fewer or shorter examples, ask for fewer passes, or take a smaller model"
    smaller: str = "send fewer or shorter examples, take a smaller model, or ask for a worker with more memory"

    def timed_out(self) -> TimedOut:
        """The error of an attempt that ran for too long."""
        return TimedOut(
            f"the {self.what} ran for more than {self.seconds:,} s, which is the limit here: {self.quicker}"
        )

    def out_of_memory(self, what: str) -> OutOfMemory:
        """The error of one that needed too much memory, with what its user can do."""
        return OutOfMemory(f"{what}: {self.smaller}")


class Watch:
    """One attempt's use of the machine against its limits."""

    def __init__(self, pid: int, settings: Settings, terms: Terms, disk_used: Callable[[], int]) -> None:
        """
        Args:
            pid: the attempt's process.
            disk_used: the bytes that its files take.
        """
        self.terms = terms
        self._pid = pid
        self._settings = settings
        self._disk_used = disk_used
        self._began = self._counted = time.monotonic()
        self._oom_kills = (oom_kills(), oom_kills())
        self.peak_bytes = 0

    def breach(self) -> C2IError | None:
        """The limit that is exceeded now, in words for the job's user."""
        settings, what, now = self._settings, self.terms.what, time.monotonic()
        if now - self._began > self.terms.seconds:
            return self.terms.timed_out()
        processes = [self._pid]
        if now - self._counted > COUNT_SECONDS:
            self._counted = now
            self._oom_kills = (self._oom_kills[1], oom_kills())
            processes = descendants(os.getpid())
            if len(processes) > MAX_PROCESSES:
                return InternalError(f"the {what} started more than {MAX_PROCESSES} processes, which none does")
            if self._disk_used() > settings.job_disk_bytes:
                return out_of_disk(settings.job_disk_bytes)
        used = sum(map(resident_bytes, processes))
        self.peak_bytes = max(self.peak_bytes, used)
        if settings.job_memory_bytes is not None and used > settings.job_memory_bytes:
            limit = f"{settings.job_memory_bytes / 1e9:.1f} GB"
            return self.terms.out_of_memory(f"the {what} took more memory than its limit, {limit}")
        return None

    def memory_ran_out(self) -> bool:
        """Whether the kernel ended a process for want of memory in the last seconds."""
        return oom_kills() > self._oom_kills[0]


def end_descendants() -> None:
    """Kill and reap every process below this one: what a job's process started, wherever it went."""
    deadline = time.monotonic() + END_SECONDS
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def out_of_disk(limit: int) -> OutOfDisk:
    """The error of a job that wrote too much."""
    return OutOfDisk(f"the job wrote more than its limit of {limit / 1e9:.1f} GB: take a smaller model")


def limit_this_process(settings: Settings) -> None:
    """In a job's process, before it does anything."""
    # Where memory runs out, this process is the one to go: not the API, not Redis.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("800")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (settings.job_disk_bytes, settings.job_disk_bytes))


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, also those that left its process group. Zombies are none."""
    children: dict[int, list[int]] = {}
    for name in [entry.name for entry in os.scandir("/proc") if entry.name.isdigit()]:
        try:
            with Path(f"/proc/{name}/stat").open("rb", buffering=0) as file:
                # pid (name) state parent ...: a name may hold anything.
                state, parent = file.read().rpartition(b")")[2].split(maxsplit=2)[:2]
        except OSError:  # it ended
            continue
        if state != b"Z":
            children.setdefault(int(parent), []).append(int(name))
    found, level = list[int](), [pid]
    while level:
        level = [child for parent in level for child in children.get(parent, ())]
        found += level
    return found


def resident_bytes(pid: int) -> int:
    """Memory that a process has written to. Pages of files are not counted: the kernel takes them back at will."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory since the machine started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Output:
    """What a job's process says. Its log goes on to the worker's, up to a limit: no job fills a disk with it.

    What is printed is no log: it comes from packages and may hold anything of the job. It is counted and dropped, but
    for those who look for a fault.
    """

    def __init__(self, *, passes_print: bool) -> None:
        self._log = _Pipe()
        self._printed = _Pipe()
        self._passes_print = passes_print

    def take_over(self) -> None:
        """In the child: write into it."""
        for descriptor in (1, 2):
            os.dup2(self._printed.writer, descriptor)
        logs.write_to(self._log.writer)

    def pass_on(self) -> None:
        """In the parent: what has come since. A child that writes faster than it is asked waits."""
        self._log.read(pass_on=True)
        self._printed.read(pass_on=self._passes_print)

    def close(self) -> None:
        """Pass on the rest, and end."""
        self.pass_on()
        for pipe in (self._log, self._printed):
            pipe.close()
        if self._printed.bytes and not self._passes_print:
            logger.info(
                "what the job's process printed is dropped; C2I_LOG_LEVEL=DEBUG passes it on", bytes=self._printed.bytes
            )


class _Pipe:
    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self.bytes = 0
        """That have come so far."""

    def read(self, *, pass_on: bool) -> None:
        with contextlib.suppress(OSError):  # nothing has come, or nobody takes it
            text = os.read(self._reader, PIPE_BYTES)
            left = max(0, MAX_OUTPUT_BYTES - self.bytes)
            self.bytes += len(text)
            if pass_on:
                os.write(2, text[:left])
                if 0 < left <= len(text):
                    os.write(2, b"\n... the job's further output is dropped\n")

    def close(self) -> None:
        os.close(self._reader)
        os.close(self.writer)

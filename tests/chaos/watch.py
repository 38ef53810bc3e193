"""Sees every process that works on a job, and never two on one.

A job's process is a child of a worker and bears the end of the job's ID as its name. One that was seen is followed
until it is gone, also when its worker is not there any more.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

LOOK_SECONDS = 0.02
NAME = re.compile(r"[0-9a-z]{15}")


class Watcher(threading.Thread):
    """Looks fifty times a second."""

    def __init__(self, parents: Callable[[], Iterable[int]]) -> None:
        """
        Args:
            parents: the pids of the workers that live now.
        """
        super().__init__(name="watcher", daemon=True)
        self._parents = parents
        self._known: set[int] = set()
        self._alive: dict[str, list[int]] = {}
        self._over = threading.Event()
        self.doubled: dict[str, set[int]] = {}
        """Names of jobs that two processes worked on at one time, with their pids."""

    def run(self) -> None:
        """Look until stopped."""
        while not self._over.wait(LOOK_SECONDS):
            self.look()

    def stop(self) -> None:
        """End."""
        self._over.set()
        if self.is_alive():
            self.join()

    def alive(self) -> dict[str, list[int]]:
        """The processes of each job, as of the last look."""
        return dict(self._alive)

    def look(self) -> None:
        """Once."""
        for parent in self._parents():
            with contextlib.suppress(OSError):
                self._known.update(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
        alive: dict[str, list[int]] = {}
        for pid in list(self._known):
            name = _name(pid)
            if name is None:
                self._known.discard(pid)
            elif NAME.fullmatch(name):
                alive.setdefault(name, []).append(pid)
        self._alive = alive
        for name, pids in alive.items():
            if len(pids) > 1:
                self.doubled.setdefault(name, set()).update(pids)


def _name(pid: int) -> str | None:
    """Of a process; None where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # pid (name) state ...: a name may hold anything.
    head, _, tail = text.rpartition(")")
    return None if tail.split()[0] in "ZX" else head.partition("(")[2]

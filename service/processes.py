"""Child processes that are kept alive, stopped in order, and never outlive this one, however it dies."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# A child that ends sooner is started again only after a pause that doubles up to the second figure.
RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 5.0
STABLE_SECONDS = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """In a new child: be killed when the thread that forked it ends. Exits where that has happened already."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """From now on a process below this one, whose own parent ends, becomes this one's child and not the system's."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Child:
    """A process that is started again when it ends.

    It is forked by a thread that lives as long as the child is wanted, since the kernel's parent-death signal
    follows the forking thread and not the process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._command = list(command)
        self._env = env
        self._pass_fds = tuple(pass_fds)
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def pid(self) -> int | None:
        """The process now running, None between two."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def start(self) -> None:
        """Start the process, and again whenever it ends."""
        self._thread.start()

    def request_stop(self) -> None:
        """Ask it to end, without waiting."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def stop(self, timeout: float) -> None:
        """Ask it to end, kill it after `timeout` seconds; it is gone on return."""
        self.request_stop()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive():
            self._thread.join(0.25)
            self._signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process and process.poll() is None:
            process.send_signal(number)

    def _run(self) -> None:
        pause = RESTART_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._process = subprocess.Popen(  # noqa: S603 - the callers' own commands
                    self._command,
                    env=self._env,
                    pass_fds=self._pass_fds,
                    stdin=subprocess.DEVNULL,
                    # A terminal's Ctrl-C reaches this process only, which then stops its children in order.
                    start_new_session=True,
                    preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - calls prctl and getppid only
                )
            except OSError as error:
                logger.error("%s cannot be started: %s", self.name, error)
            else:
                code = self._process.wait()
                if self._stopping.is_set():
                    return
                logger.warning("%s ended with code %d; starting it again", self.name, code)
            pause = RESTART_SECONDS if time.monotonic() - began > STABLE_SECONDS else pause
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_RESTART_SECONDS)

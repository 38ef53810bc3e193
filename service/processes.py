"""Child processes that are kept alive, stopped in order, and never outlive this one, however it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

from service.logs import named

logger = named(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# A child that ends sooner than the last figure is started again only after a pause that doubles: up to the second
# where it was killed, up to the third where it ended by itself, since it will do so again.
RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 5.0
LONGEST_FAILURE_SECONDS = 60.0
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
        self._told: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def pid(self) -> int | None:
        """The process now running, None between two."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def start(self) -> None:
        """Start the process, and again whenever it ends."""
        self._thread.start()

    def request_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, without waiting."""
        self._stopping.set()
        self._told = self._process
        self._signal(number)

    def stop(self, timeout: float) -> None:
        """Ask it to end, if that was not done yet, and kill it after `timeout` seconds; it is gone on return."""
        self._stopping.set()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive():
            if self._process is not self._told:  # also one that was started at this very moment
                self.request_stop()
            self._thread.join(0.25)
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process and process.poll() is None:
            process.send_signal(number)

    def _run(self) -> None:
        pause = RESTART_SECONDS
        while not self._stopping.is_set():
            began, longest = time.monotonic(), LONGEST_FAILURE_SECONDS
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
                problem = f"cannot be started: {os.strerror(error.errno or 0)}"
            else:
                code = self._process.wait()
                if self._stopping.is_set():
                    return
                longest = LONGEST_RESTART_SECONDS if code < 0 else LONGEST_FAILURE_SECONDS
                problem = f"ended with code {code}"
            pause = RESTART_SECONDS if time.monotonic() - began > STABLE_SECONDS else min(pause, longest)
            logger.warning(
                "a process ended; starting it again", process=self.name, problem=problem, pause=round(pause, 1)
            )
            self._stopping.wait(pause)
            pause *= 2

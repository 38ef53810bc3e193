"""A job's process never outlives the lease that its worker holds on the job.

The lease lapses in Redis when the worker does not renew it: it was stopped (SIGSTOP, a frozen machine), or is cut off
from Redis. Another worker then takes the job, and this one's process, which may be well, must be gone before. The
worker tells it through shared memory when it last renewed; the process keeps an alarm clock set to the end of the
lease, which the kernel rings whatever the process is doing.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from typing import NoReturn

from service.queue import LEASE_SECONDS

# It ends so much before the lease, and the kernel ends it so much before the lease if it cannot.
MARGIN_SECONDS = 3.0
ALARM_SECONDS = 2.0
SET_SECONDS = 0.5


class Lease:
    """When the lease was renewed last, known to a worker and the process that it forks."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)
        self.renewed(time.monotonic())

    def renewed(self, at: float) -> None:
        """It was renewed by a command that was sent at this time of the monotonic clock."""
        struct.pack_into("d", self._shared, 0, at)

    @property
    def left_seconds(self) -> float:
        """How long it holds."""
        return float(struct.unpack_from("d", self._shared, 0)[0]) + LEASE_SECONDS - time.monotonic()

    @property
    def lapsed(self) -> bool:
        """Whether it is over for the process, which may have a moment to live."""
        return self.left_seconds < MARGIN_SECONDS

    def bind_this_process(self) -> None:
        """In a job's process: end it, and its group, with the lease."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left_seconds - ALARM_SECONDS))
        threading.Thread(target=self._bind, name="lease", daemon=True).start()

    def _bind(self) -> NoReturn:
        while True:
            if self.lapsed:
                os.killpg(0, signal.SIGKILL)
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self.left_seconds - ALARM_SECONDS))
            time.sleep(SET_SECONDS)

"""What a worker computes with, and how fast. Imports torch only where it measures."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

from service.errors import Unavailable
from service.processes import die_with_parent
from service.workforce import WorkerInfo

# The start of CUDA takes some seconds, on a machine under load many.
MEASURE_SECONDS = 120.0
SIZE = 768
REPEATS_SECONDS = 0.1


class Machine(NamedTuple):
    """A worker's means."""

    device: str
    """`cpu`, or the name of the GPU."""
    threads: int
    """Threads of one tensor operation on the processor."""
    speed: float | None
    """GFLOP/s of a float32 matrix product on the device."""


def measure() -> Machine:
    """Device, threads and the best speed of a product of two (768, 768) float32 matrices within a tenth of a second."""
    import torch  # noqa: PLC0415 - the stand-in of tests never needs it

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(SIZE, SIZE, device=device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < REPEATS_SECONDS or best == float("inf"):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return Machine(name, torch.get_num_threads(), round(2 * SIZE**3 / best / 1e9, 1))


def in_child(probe: Callable[[], Machine]) -> Machine:
    """What `probe` finds, in a process of its own: this one must start neither CUDA nor threads, since it forks.

    Raises:
        Unavailable: nothing can be computed here; says why.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        try:
            try:
                answer: object = probe()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writer, json.dumps(answer).encode()[: select.PIPE_BUF])
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], MEASURE_SECONDS)
    if not ready:
        os.kill(child, signal.SIGKILL)
    answer_text = os.read(reader, select.PIPE_BUF) if ready else b""
    os.close(reader)
    _, status = os.waitpid(child, 0)
    found = json.loads(answer_text) if answer_text else f"the test ended with {os.waitstatus_to_exitcode(status)}"
    if isinstance(found, str):
        raise Unavailable(f"this worker cannot compute: {found}")
    return Machine(*found)


def introduce(machine: Machine) -> WorkerInfo:
    """This process, as a worker announces itself."""
    now = datetime.now(UTC)
    return WorkerInfo(
        id=f"worker_{secrets.token_hex(6)}",
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version("compress-to-impress"),
        device=machine.device,
        threads=machine.threads,
        speed=machine.speed,
        started_at=now,
        seen_at=now,
    )

"""The energy that this machine has used so far, where it tells.

Of a GPU by NVML, if its Python package is installed; else of the processor by RAPL, from the files that the kernel
shows of it (https://docs.kernel.org/power/powercap/powercap.html). Most systems let only root read those; virtual
machines have none. Either counts all that runs there, not this process alone.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# A processor's package. `intel-rapl:0:1` is a part of it, and counted with it; AMD's have the same names.
PACKAGE = re.compile(r"intel-rapl:\d+")


class Meter:
    """Reads the machine's counters."""

    def __init__(self, *, gpu: bool, powercap: Path = POWERCAP) -> None:
        self._gpu = _nvml() if gpu else None
        self._packages: list[Path] = []
        if not gpu and powercap.is_dir():
            self._packages = sorted(path for path in powercap.iterdir() if PACKAGE.fullmatch(path.name))

    def read(self) -> list[float]:
        """Joules that each counter stands at; nothing where the machine does not tell."""
        with contextlib.suppress(Exception):  # NVML's own errors, files that may not be read
            if self._gpu is not None:
                return [self._gpu.nvmlDeviceGetTotalEnergyConsumption(self._gpu.nvmlDeviceGetHandleByIndex(0)) / 1e3]
            return [int((path / "energy_uj").read_text()) / 1e6 for path in self._packages]
        return []

    def since(self, before: list[float]) -> float | None:
        """Joules used since an earlier reading, None where the machine does not tell."""
        now = self.read()
        if not now or len(now) != len(before):
            return None
        used = 0.0
        for k, (earlier, later) in enumerate(zip(before, now, strict=True)):
            used += later - earlier
            if later < earlier:  # the counter began again at 0
                used += int((self._packages[k] / "max_energy_range_uj").read_text()) / 1e6
        return used


def _nvml() -> Any | None:
    with contextlib.suppress(Exception):
        import pynvml  # noqa: PLC0415 - few have it

        pynvml.nvmlInit()
        return pynvml
    return None

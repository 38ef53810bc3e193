"""What a checkpoint takes and how fast it is: measured in processes that end with the one that asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import InternalError
from tests import tiny
from tests.live import REPOSITORY, wait_until
from workers.energy import Meter
from workers.limits import descendants
from workers.speed import measure

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModels = Callable[..., Path]


def test_a_larger_model_is_slower_and_takes_more_and_a_masked_one_decodes_nothing(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    deep = tiny.build("gpt2", tmp_path / "deep", shape={"n_embd": 256, "n_layer": 16})
    small, large = measure([tiny_models("bert"), deep])
    assert large.bytes == (deep / "model.safetensors").stat().st_size > 50e6
    # Its weights are 50 MB, and their file's pages may be in memory too: each process has a peak of its own.
    assert 25e6 < large.peak_memory_bytes - small.peak_memory_bytes < 250e6
    assert small.prefill_tokens_per_second > 2 * large.prefill_tokens_per_second
    assert large.decode_tokens_per_second is not None
    assert 1 < large.decode_tokens_per_second < large.prefill_tokens_per_second
    assert small.decode_tokens_per_second is None
    assert small.joules_per_token is None


def test_what_cannot_be_loaded_is_told_and_leaves_no_process(tiny_models: TinyModels, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_models("llama") / "config.json").read_text())
    with pytest.raises(InternalError, match="speed cannot be measured: OSError"):
        measure([broken])
    assert not [pid for pid in descendants(os.getpid()) if "workers.speed" in command(pid)]


def test_no_process_outlives_the_one_that_measures(tiny_models: TinyModels) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys, workers.speed as s; s.measure([s.Path(a) for a in sys.argv[1:]])"]
        + [str(tiny_models("llama"))] * 2,
        cwd=REPOSITORY,
    )
    wait_until(lambda: len(descendants(parent.pid)) == 2, 60, "two processes that measure")
    children = descendants(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(command(pid) for pid in children), 10, "their end")


def command(pid: int) -> str:
    """A process's command line; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def test_energy_is_the_sum_of_the_packages_and_goes_on_where_a_counter_begins_again(tmp_path: Path) -> None:
    def show(name: str, used: int, largest: int = 10_000_000) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "energy_uj").write_text(f"{used}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{largest}\n")

    for name, used in (("intel-rapl:0", 9_000_000), ("intel-rapl:1", 1_000_000), ("intel-rapl:0:0", 500_000)):
        show(name, used)
    (tmp_path / "intel-rapl").mkdir()  # the kernel's own entry of the whole
    meter = Meter(gpu=False, powercap=tmp_path)
    before = meter.read()
    assert before == [9.0, 1.0]
    show("intel-rapl:0", 500_000)
    show("intel-rapl:1", 1_250_000)
    show("intel-rapl:0:0", 900_000)
    assert meter.since(before) == pytest.approx(1.5 + 0.25)


def test_a_machine_that_does_not_tell_has_no_energy(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").mkdir()  # its counter may not be read
    for powercap in (tmp_path, tmp_path / "missing"):
        meter = Meter(gpu=False, powercap=powercap)
        assert meter.since(meter.read()) is None
    meter = Meter(gpu=True, powercap=tmp_path)  # no GPU, or nothing that asks it
    assert meter.since(meter.read()) is None

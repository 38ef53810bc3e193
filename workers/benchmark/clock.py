"""What a cell's work takes, whoever else uses the machine."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds of processor time over the number of torch's threads: what a wall clock would show of work that keeps all
    of them busy, if it had the cores to itself, so that other processes on them make no method look dear. Of work on
    one thread it shows less, unless there is but one (`OMP_NUM_THREADS=1`). With a GPU, the wall clock, once all that
    was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()

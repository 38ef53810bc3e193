"""What a cell's work takes, whoever else uses the machine."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds that this process has computed, on the mean of its threads: what a wall clock would show if it had the
    cores to itself, so that other processes on them make no method look dear. With a GPU, the wall clock, once all that
    was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()

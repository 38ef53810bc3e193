"""Where memory ends."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, and what torch raises where the processor's memory ends. Told by name: no import of torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )

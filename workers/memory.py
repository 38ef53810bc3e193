"""Where memory ends."""

from __future__ import annotations

# What torch and the libraries below it raise as a plain RuntimeError: the processor's allocator, C++ itself, CUDA
# outside of torch's allocator, and cuBLAS.
MESSAGES = ("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, CUDA's, and what torch raises where the processor's memory ends. Told by name: no import of torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES))
    )

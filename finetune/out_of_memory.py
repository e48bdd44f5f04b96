"""Out-of-memory errors: detection, and retries with smaller batches."""

from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def means_out_of_memory(error: Exception) -> bool:
    """Whether this is how Python, or torch on a GPU or, in other words, on a CPU, says that no memory is left."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def halved_until_it_fits(compute: Callable[[int], _T], size: int) -> _T:
    """Return `compute(size)`, with half the size each time that memory runs out.

    Args:
        compute: takes how many rows it computes together.
        size: how many at first, 1 or more.

    Raises:
        torch.OutOfMemoryError, RuntimeError, MemoryError: as `compute(1)` does when memory runs out.
    """
    while True:
        try:
            return compute(size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not means_out_of_memory(error):
                raise
        size = -(-size // 2)
        free_cached_memory()  # no more in the handler: the error keeps what is to be freed


def free_cached_memory() -> None:
    """Give back what torch has reserved on the GPU and does not use."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Memory that runs out."""

import pytest
import torch

from finetune.out_of_memory import halved_until_it_fits, means_out_of_memory


def test_the_size_is_halved_until_it_fits() -> None:
    sizes = []

    def compute(size: int) -> str:
        sizes.append(size)
        if size > 1:
            raise MemoryError
        return "done"

    assert halved_until_it_fits(compute, 7) == "done"
    assert sizes == [7, 4, 2, 1]


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("no space left"), False),
    ],
)
def test_what_means_that_no_memory_is_left(error: Exception, means: bool) -> None:
    assert means_out_of_memory(error) is means

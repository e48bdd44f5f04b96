"""Fixed batch sizes for frozen networks, so that the bits of a row do not depend on the other rows.

A GPU computes several small pictures, or captions, in little more time than one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.out_of_memory import halved_until_it_fits

_CAPTIONS = 8
_PICTURES = 8
_PIXELS = 4 * 512**2
"""Together, at most, unless one has more: an H100 encodes four pictures at 512 px in 2.5 times the time of one."""


def caption_batch_size(device: torch.device) -> int:
    """How many captions a text encoder on `device` computes at once: one by one on a CPU, which gains nothing."""
    return 1 if device.type == "cpu" else _CAPTIONS


def image_batch_size(device: torch.device, height: int, width: int) -> int:
    """How many pictures of so many pixels a VAE on `device` computes at once."""
    return 1 if device.type == "cpu" else max(1, min(_PICTURES, _PIXELS // (height * width)))


@dataclass
class FixedBatches:
    """Computes rows in parts of one fixed size, and in smaller ones from the moment that memory runs out."""

    most: int | None = None
    """Rows of a part since memory has run out; None: it has not."""

    def size(self, usual: int) -> int:
        """Rows of a part, where there are `usual` as long as memory suffices."""
        return usual if self.most is None else min(usual, self.most)

    def __call__(self, compute: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, usual: int) -> tuple[Tensor, ...]:
        """What `compute` answers to rows (B, ...).

        Args:
            compute: as many rows as a part has -> tensors of that first size.
            rows: those to compute.
            usual: rows of a part.

        Raises:
            torch.OutOfMemoryError, RuntimeError: memory does not suffice for one row.
        """

        def attempt(size: int) -> tuple[Tensor, ...]:
            answers = run_in_fixed_batches(compute, rows, size)
            self.most = self.most if size == usual else size
            return answers

        return halved_until_it_fits(attempt, self.size(usual))


def run_in_fixed_batches(
    compute: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, size: int
) -> tuple[Tensor, ...]:
    """What `compute` answers to rows, (B, ...), computed in parts of `size`, the last of which is filled with zeros.

    Args:
        compute: `size` rows -> tensors of first size `size`.
    """
    answers = []
    for part in rows.split(size):
        padded = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
        answers.append([answer[: len(part)] for answer in compute(padded)])
    return tuple(torch.cat(column) for column in zip(*answers, strict=True))

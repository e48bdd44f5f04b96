"""The order of the examples: a pure function of (seed, step), independent of ranks, workers and micro-batch."""

from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch

from finetune.seeding import fold


class Visit(NamedTuple):
    """One look at one example."""

    example: int
    """Index of the example in its dataset."""
    number: int
    """How many times it has been visited before."""


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Optimizer steps in which every example is visited once; the last may be short."""
    return ceil(size / batch_size)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    source = torch.Generator().manual_seed(fold(seed, "order", epoch) & 0xFFFFFFFF)
    return torch.randperm(size, generator=source).tolist()


def step_visits(step: int, *, size: int, batch_size: int, seed: int) -> list[Visit]:
    """The visits of optimizer step `step` (0 for the first).

    Every epoch is a fresh permutation of all `size` examples, cut into batches of `batch_size`; none is left out,
    so an epoch's last batch holds what remains.
    """
    epoch, position = divmod(step, steps_per_epoch(size, batch_size))
    start = position * batch_size
    return [Visit(example, epoch) for example in _order(seed, epoch, size)[start : start + batch_size]]

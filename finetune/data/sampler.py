"""The order of the examples: a pure function of (seed, step), independent of ranks, workers and micro-batch."""

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch

from finetune.seeding import fold


class Visit(NamedTuple):
    """One look at one example."""

    example: int
    """Index of the example in its dataset."""
    number: int
    """How many times it has been visited before."""


def steps_per_epoch(size: int, batch_size: int) -> Fraction:
    """Optimizer steps in which every example is visited once: no whole number where a step runs into the next epoch."""
    return Fraction(size, batch_size)


def visited(*, size: int, batch_size: int, seed: int, steps: int) -> list[int]:
    """The examples that the first `steps` steps visit, in the order of their first visits."""
    found: dict[int, None] = {}
    for step in range(steps):
        if len(found) == size:
            break
        found |= dict.fromkeys(v.example for v in step_visits(step, size=size, batch_size=batch_size, seed=seed))
    return list(found)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    source = torch.Generator().manual_seed(fold(seed, "order", epoch) & 0xFFFFFFFF)
    return torch.randperm(size, generator=source).tolist()


def step_visits(step: int, *, size: int, batch_size: int, seed: int) -> list[Visit]:
    """The `batch_size` visits of optimizer step `step` (0 for the first).

    Every epoch is a fresh permutation of all `size` examples. One follows the other without a gap, and steps are cut
    from that: an epoch may end within a step, and no step is short, so none teaches few examples at the full rate.
    """
    places = (divmod(position, size) for position in range(step * batch_size, (step + 1) * batch_size))
    return [Visit(_order(seed, epoch, size)[place], epoch) for epoch, place in places]

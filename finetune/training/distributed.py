"""Parallel: the processes of a run, as each of them sees it. A single process is the simplest case.

What the hosts agree on goes over the CPUs (gloo) and waits for no device. It is also what holds the processes together
while the first of them draws pictures or writes: they meet there before each reduction on the devices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.errors import Elsewhere
from finetune.out_of_memory import means_out_of_memory

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: as long as the first may take to draw its grids. One that has ended is
noticed at once."""

_BUCKET = 2**26
"""Numbers that are added up at once."""


@dataclass(frozen=True)
class Parallel:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1
    cpu_group: Any = None
    """Their process group on the CPUs; None for one alone."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes, draws and tells."""
        return self.rank == 0

    def all_reduce_max(self, number: int) -> int:
        """The largest of the numbers that the processes bring."""
        if self.world_size == 1:
            return number
        reduced = torch.tensor(number)
        with _meeting():
            dist.all_reduce(reduced, dist.ReduceOp.MAX, self.cpu_group)
        return int(reduced)

    def all_equal(self, what: object) -> bool:
        """Whether all processes bring the same."""
        if self.world_size == 1:
            return True
        brought: list[Any] = [None] * self.world_size
        with _meeting():
            dist.all_gather_object(brought, what, self.cpu_group)
        return all(other == what for other in brought)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process run the block before the others, which find what it has written."""
        if not self.is_main_process:
            self.all_reduce_max(0)
        yield
        if self.is_main_process:
            self.all_reduce_max(0)
        self.all_reduce_max(0)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        if self.world_size > 1:
            with _meeting():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    @torch.no_grad()
    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors their sums over all processes, the same bits in each."""
        if self.world_size == 1:
            return
        buckets, size = list[list[Tensor]]([[]]), 0
        for tensor in tensors:
            if buckets[-1] and size + tensor.numel() > _BUCKET:
                buckets.append([])
                size = 0
            buckets[-1].append(tensor)
            size += tensor.numel()
        with _meeting():
            flat = [torch.cat([tensor.reshape(-1) for tensor in bucket]) for bucket in buckets]
            under_way = [dist.all_reduce(numbers, async_op=True) for numbers in flat]
            for numbers, work, bucket in zip(flat, under_way, buckets, strict=True):
                work.wait()  # on a GPU: its stream waits, the host does not
                pieces = numbers.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(pieces, bucket, strict=True)])


def from_environment() -> Parallel:
    """As `accelerate launch` or torchrun have started us, and an `Accelerator` has connected us; else one alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Parallel()
    return Parallel(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch raises no narrower one when a connection is gone
        if means_out_of_memory(error):
            raise
        raise Elsewhere("another of the processes that train together has ended") from error

"""CUDA graphs: forward and backward pass of a micro-batch as one launch.

A UNet's step is some thousands of kernels. With few examples each takes less time than the host needs to launch it: at
batch 4 an H100 waits for more than half of a step. A graph is recorded once and then launched as a whole.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.batch import map_tensors, tensors_of

WARM_UP = 3
"""Micro-batches of a shape that are computed kernel by kernel before it is recorded: libraries choose algorithms."""

SPARE = 0.25
"""Share of the device's memory that is left free beside the graphs, for sample grids and checkpoints."""

MOST = 32
"""Graphs; of the shapes that come after these, as many buckets may have, micro-batches are computed as they are."""


Shape = tuple[torch.Size, ...]
"""Of all tensors of a micro-batch."""


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: list[Tensor]
    losses: Tensor
    gradients: dict[str, Tensor]


class CudaGraphs:
    """Computes micro-batches, and records a graph for each shape that comes often enough and fits into memory.

    Args:
        compute: micro-batch -> losses of its examples, after its backward pass. It may read nothing from the device,
            and draws nothing.
        parameters: whose gradients the backward pass makes again.
        device: a CUDA device.
    """

    def __init__(self, compute: Callable[[Any], Tensor], parameters: Mapping[str, nn.Parameter], device: torch.device):
        self._compute, self._parameters, self._device = compute, parameters, device
        self._seen: dict[Shape, int] = {}
        self._activations: dict[Shape, int] = {}
        self._recorded: dict[Shape, _Recorded] = {}
        self._refused: set[Shape] = set()
        self._pool: Any = None

    def __call__(self, part: Any) -> Tensor:
        """`compute(part)`: the losses, and each parameter's gradient in its `.grad`, which was None."""
        inputs = tensors_of(part)
        shape = tuple(tensor.shape for tensor in inputs)
        if shape not in self._recorded:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM_UP:
                return self._measured(part, shape)
            if shape in self._refused or not self._room(shape):
                self._refused.add(shape)
                return self._compute(part)
            self._recorded[shape] = self._record(part)
        recorded = self._recorded[shape]
        torch._foreach_copy_(recorded.inputs, inputs, non_blocking=True)
        recorded.graph.replay()
        for name, gradient in recorded.gradients.items():
            self._parameters[name].grad = gradient
        return recorded.losses.clone()

    def _measured(self, part: Any, shape: Shape) -> Tensor:
        """Compute it kernel by kernel, and note the memory that it takes on the way."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        losses = self._compute(part)
        self._activations[shape] = torch.cuda.max_memory_allocated(self._device) - before
        return losses

    def _room(self, shape: Shape) -> bool:
        """Whether a graph of this shape leaves enough memory for all else.

        Its gradients stay its own; activations lie where those of the other graphs do.
        """
        if len(self._recorded) >= MOST:
            return False
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        gradients = sum(p.numel() * p.element_size() for p in self._parameters.values())
        shared = max((self._activations[other] for other in self._recorded), default=0)
        return free - gradients - max(0, self._activations[shape] - shared) >= SPARE * total

    def _record(self, part: Any) -> _Recorded:
        part = map_tensors(torch.clone, part)
        graph = torch.cuda.CUDAGraph()
        # Another thread copies the next step meanwhile, which must not end the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._compute(part)
        self._pool = graph.pool()
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        for parameter in self._parameters.values():
            parameter.grad = None
        return _Recorded(graph, tensors_of(part), losses, gradients)

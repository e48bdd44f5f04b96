"""MasterWeights: fp32 copies of weights that are computed with in half precision.

Micikevicius et al. 2018, "Mixed Precision Training", section 3.1: an update is often smaller than half precision can
add to a weight, so it is added to an fp32 copy, and the network computes with that copy rounded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MasterWeights:
    """The parameters of a network that learn, in fp32, and the rounded ones that stand in the network for them.

    The network computes in `dtype` from then on: what is frozen is rounded in place, and each parameter that requires
    a gradient is replaced by a rounded working copy. The parameter itself, which an optimizer or `Ema` made before
    holds, becomes the master.

    Args:
        network: its parameters that require gradients are in fp32.
        dtype: what it computes in; None leaves everything as it is, and the parameters are their own masters.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None):
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.held = self.parameters
        """What an optimizer holds."""
        self.working = self.parameters
        self._network = network
        if dtype is not None:
            self.working = {name: nn.Parameter(p.detach().to(dtype)) for name, p in self.parameters.items()}
            self._place(self.working)
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)

    def _place(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._network.get_submodule(owner), leaf, parameter)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the working copies to those of the masters, and free them: after each backward pass."""
        if self.working is self.parameters:
            return
        fresh: list[Tensor] = []
        rounded: list[Tensor] = []
        for name, copy in self.working.items():
            master, grad, copy.grad = self.parameters[name], copy.grad, None
            if grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh.append(master.grad)
                rounded.append(grad)
            else:
                master.grad.add_(grad)
        if fresh:
            torch._foreach_copy_(fresh, rounded)

    def discard(self) -> None:
        """Drop what a backward pass that was broken off has left in the working copies."""
        for copy in self.working.values():
            copy.grad = None

    def update(self, step: Callable[[], object], _key: int) -> None:
        """`step` of the optimizer, which holds the masters; nothing is drawn for it."""
        step()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the working copies: after each update."""
        if self.working is not self.parameters:
            torch._foreach_copy_(list(self.working.values()), list(self.parameters.values()))

    @contextmanager
    def lent_weights(self) -> Iterator[None]:
        """Put the masters into the network for a while: for an export."""
        self._place(self.parameters)
        try:
            yield
        finally:
            self._place(self.working)

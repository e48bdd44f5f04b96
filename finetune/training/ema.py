"""Exponential moving average (EMA) of the weights, with a decay that is a pure function of the step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay(step: int, *, inv_gamma: float = 1.0, power: float = 0.75, max_decay: float = 0.9999) -> float:
    """1 - (1 + step / inv_gamma) ** -power, at most `max_decay`; the form of k-diffusion and diffusers' EMAModel.

    Early steps are forgotten quickly, so that short runs do not keep their starting weights.
    """
    return min(max_decay, 1 - (1 + step / inv_gamma) ** -power)


class Ema:
    """A second copy of the trained weights that follows them slowly.

    Args:
        parameters: name -> parameter; the copy starts equal to them.
        inv_gamma, power, max_decay: see `decay`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        inv_gamma: float = 1.0,
        power: float = 0.75,
        max_decay: float = 0.9999,
    ):
        self.parameters = dict(parameters)
        self.shadow = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.settings = {"inv_gamma": inv_gamma, "power": power, "max_decay": max_decay}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (0 for the first): shadow += (1 - decay) (parameter - shadow)."""
        weight = 1 - decay(step, **self.settings)
        live = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap the averaged weights into the model for a while: for sampling, validation and export."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over saved averages, by name."""
        for name, tensor in self.shadow.items():
            tensor.copy_(shadow[name])

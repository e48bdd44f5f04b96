"""MaxNorm: keep the update of each layer of a LoRA below a norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoraPair:
    """The names of the two matrices of a layer, and the scale of their product."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class MaxNorm:
    """Scales the matrices of a layer down after each step whose update has a larger norm.

    sd-scripts' `--scale_weight_norms` (`networks/lora.py`, `apply_max_norm_regularization`).
    """

    pairs: Sequence[LoraPair]
    limit: float
    """The Frobenius norm that scale * B A may have."""

    @torch.no_grad()
    def __call__(self, parameters: Mapping[str, Tensor]) -> None:
        """Scale the parameters, name -> tensor, in place."""
        for pair in self.pairs:
            down, up = parameters[pair.down], parameters[pair.up]
            norm = pair.scale * (up.flatten(1) @ down.flatten(1)).norm()
            root = (self.limit / norm.clamp(min=self.limit)).sqrt()
            down.mul_(root)
            up.mul_(root)

"""LossFunction: how the error of a prediction counts at each place."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossFunction:
    """Squared error, or a function that counts large errors less.

    sd-scripts' forms (`library/train_util.py`, `conditional_loss` and `get_huber_threshold_if_needed`), after Khrapov
    et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss".
    """

    type: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """l2: e^2. l1: |e|. huber: 2 c (sqrt(e^2 + c^2) - c), which is e^2 for small errors and 2 c |e| for large ones.
    smooth_l1: the same without the factor c."""
    huber_c: float = 0.1
    """The c above, at the noisy end of the schedule."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How c falls from 1 without noise to `huber_c`: snr: (1 - c) / (1 + sigma)^2 + c. exponential: c^(t / T).
    constant: it does not."""

    def thresholds(self, progress: Tensor, sigma: Tensor) -> Tensor | None:
        """Return the c of each example, (B,); None for l2 and l1, which have none.

        Args:
            progress: (B,) timestep in [0, 1), as a share of the schedule.
            sigma: (B,) noise relative to the signal, sqrt((1 - abar) / abar).
        """
        if self.type in ("l2", "l1"):
            return None
        if self.huber_schedule == "exponential":
            return torch.exp(math.log(self.huber_c) * progress).to(sigma.dtype)
        if self.huber_schedule == "snr":
            return (1 - self.huber_c) / (1 + sigma) ** 2 + self.huber_c
        return torch.full_like(sigma, self.huber_c)

    def __call__(self, predicted: Tensor, target: Tensor, thresholds: Tensor | None) -> Tensor:
        """Return the error at each place, (B, C, H, W) all, thresholds (B,)."""
        error = predicted - target
        if self.type == "l2":
            return error.square()
        if self.type == "l1":
            return error.abs()
        assert thresholds is not None
        c = thresholds.view(-1, 1, 1, 1)
        smooth = 2 * ((error.square() + c.square()).sqrt() - c)
        return c * smooth if self.type == "huber" else smooth

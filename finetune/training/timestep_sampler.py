"""TimestepSampler: at which timesteps examples are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from finetune import seeding
from finetune.errors import UsageError

Distribution = Literal["uniform", "logit_normal", "sigmoid", "beta"]


@dataclass(frozen=True)
class TimestepSampler:
    """Draws timesteps within a range of the schedule, from little noise (0) to much.

    Raises:
        UsageError: `min_timestep` is not below `max_timestep`.
    """

    distribution: Distribution = "uniform"
    """Over the range. logit_normal: the logistic function of a normal variable (Esser et al. 2024, "Scaling Rectified
    Flow Transformers for High-Resolution Image Synthesis", eq. 19). sigmoid: the same with a mean of 0, as sd-scripts
    names it. beta: a beta distribution (Zheng et al. 2024, "Beta-Tuned Timestep Diffusion Model")."""
    min_timestep: int = 0
    """The lowest timestep that is drawn."""
    max_timestep: int = 1000
    """The end of the range, which is not drawn itself."""
    logit_mean: float = 0.0
    """Mean of the normal variable; above 0: more noise."""
    logit_std: float = 1.0
    """Standard deviation of the normal variable."""
    beta_alpha: float = 2.0
    """First parameter of the beta distribution; larger: more noise."""
    beta_beta: float = 2.0
    """Second parameter of the beta distribution; larger: less noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_timestep < self.max_timestep:
            raise UsageError(
                f"min_timestep = {self.min_timestep}: expected 0 to {self.max_timestep - 1}, below max_timestep "
                f"= {self.max_timestep}"
            )

    def integers(self, keys: Tensor) -> Tensor:
        """Return a timestep for each key: (B,) -> (B,) int64 on the CPU, in [min_timestep, max_timestep)."""
        if self.distribution == "uniform":
            return self.min_timestep + seeding.integers(keys, "timestep", self.max_timestep - self.min_timestep)
        return self.continuous(keys).long().clamp(max=self.max_timestep - 1)

    def continuous(self, keys: Tensor, *, shift: float = 1.0) -> Tensor:
        """Return a real timestep for each key: (B,) -> (B,) fp64 on the CPU, from min_timestep to max_timestep.

        `shift` moves the distribution within the range: above 1, to more noise (see `FlowMatching`).
        """
        shares = self._shares(keys)
        shares = shift * shares / (1 + (shift - 1) * shares)
        return self.min_timestep + (self.max_timestep - self.min_timestep) * shares

    def _shares(self, keys: Tensor) -> Tensor:
        """Numbers from 0 to 1, of the distribution."""
        if self.distribution == "uniform":
            return seeding.uniform(keys, "timestep")
        if self.distribution == "beta":
            return _each(keys, lambda generator: generator.beta(self.beta_alpha, self.beta_beta))
        mean = self.logit_mean if self.distribution == "logit_normal" else 0.0
        return _each(keys, lambda generator: generator.normal(mean, self.logit_std)).sigmoid()

    def within(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Return timesteps that are uniform over one of equal parts of the range: (B,) -> (B,) int64 on the CPU."""
        size = self.max_timestep - self.min_timestep
        first, end = part * size // parts, (part + 1) * size // parts
        return self.min_timestep + first + seeding.integers(keys, "timestep", max(1, end - first))


def _each(keys: Tensor, draw: Callable[[np.random.Generator], float]) -> Tensor:
    """Draw a number for each key; torch's beta distribution takes no generator."""
    seeds = [seeding.fold(key, "timestep") for key in keys.tolist()]
    return torch.tensor([draw(np.random.default_rng(seed)) for seed in seeds], dtype=torch.float64)

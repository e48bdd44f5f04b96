"""NoiseSampler: the noise of an example at a visit, plain or with the additions that people train with."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from finetune import seeding


@dataclass(frozen=True)
class NoiseSampler:
    """Draws the noise of an example from its key."""

    offset: float = 0.0
    """Strength of a constant per channel that is added to the noise (Guttenberg 2023, "Diffusion with Offset
    Noise")."""
    offset_random_strength: bool = False
    """Draw the offset's strength for each visit, uniformly from 0 to `offset`."""
    multires_iterations: int = 0
    """Number of coarser noises that are added; 0: none. See `pyramid_noise`."""
    multires_discount: float = 0.3
    """Factor by which each coarser noise is weaker than the one before it."""
    input_perturbation: float = 0.0
    """Strength of extra noise in x_t but not in the target (Ning et al. 2023, "Input Perturbation Reduces Exposure Bias
    in Diffusion Models", alg. 1)."""
    input_perturbation_random_strength: bool = False
    """Draw its strength for each visit, uniformly from 0 to `input_perturbation`."""

    def sample(self, keys: Tensor, shape: torch.Size) -> Tensor:
        """Return the noise, fp32 on the CPU: keys (B,), shape (C, H, W) -> (B, C, H, W)."""
        noise = seeding.normal(keys, "noise", shape)
        if self.offset:
            strength = _strength(keys, "noise offset strength", self.offset, random=self.offset_random_strength)
            noise += strength * seeding.normal(keys, "noise offset", (shape[0], 1, 1))
        if self.multires_iterations:
            sources = [seeding.generator(key, "multires noise") for key in keys.tolist()]
            pyramids = [
                pyramid_noise(one, source, iterations=self.multires_iterations, discount=self.multires_discount)
                for one, source in zip(noise, sources, strict=True)
            ]
            noise = torch.stack(pyramids)
        return noise

    def draw(self, keys: Tensor, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the noise of the target and that of x_t, where x0 is; the latter None where it is the same.

        keys (B,) on the CPU, x0 (B, C, H, W) -> (B, C, H, W) both.
        """
        noise = self.sample(keys, x0.shape[1:])
        input_noise = self.perturb(noise, keys)
        return noise.to(x0.device), None if input_noise is None else input_noise.to(x0.device)

    def perturb(self, noise: Tensor, keys: Tensor) -> Tensor | None:
        """Return the noise (B, C, H, W) that x_t holds, where it is not the target's; None: it is."""
        if not self.input_perturbation:
            return None
        random, purpose = self.input_perturbation_random_strength, "input perturbation strength"
        strength = _strength(keys, purpose, self.input_perturbation, random=random)
        return noise + strength * seeding.normal(keys, "input perturbation", noise.shape[1:])


def _strength(keys: Tensor, purpose: str, most: float, *, random: bool) -> float | Tensor:
    """What noise is multiplied by: `most`, or a number of each key from 0 to it, (B, 1, 1, 1)."""
    return most * seeding.uniform(keys, purpose).float().reshape(-1, 1, 1, 1) if random else most


def pyramid_noise(noise: Tensor, source: torch.Generator, *, iterations: int, discount: float) -> Tensor:
    """Add coarser noises to the noise of one example, and scale the sum to a standard deviation of 1.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training", as sd-scripts has it
    (`library/custom_train_functions.py`, `pyramid_noise_like`), but for one example instead of a batch: the side of
    noise i is that of the latents divided by r ** i, with r uniform in [2, 4).

    Args:
        noise: (C, H, W), the finest.
        source: of the coarser noises and their sides.
        iterations: number of noises that are added at most; a noise of one pixel is the last.
        discount: noise i counts discount ** i.
    """
    channels, height, width = noise.shape
    total = noise.clone()
    for iteration in range(iterations):
        ratio = (torch.rand((), generator=source, dtype=torch.float64).item() * 2 + 2) ** iteration
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn((1, channels, *size), generator=source)
        total += functional.interpolate(coarse, size=(height, width), mode="bilinear")[0] * discount**iteration
        if 1 in size:
            break
    return total / total.std()

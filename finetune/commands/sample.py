"""finetune-unet sample: pictures from a base model, or from a run folder with what it learned."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.config import TrainConfig, load_config
from finetune.errors import ModelError, UsageError
from finetune.models.locate import LORA_FILE


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
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 is none."""
    resolution: int | None = None
    """Pixels per side. Default: what the run was trained at, else the model's own."""
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
    folder = Path(options.model).expanduser()
    recorded = folder / "config.toml"
    config = load_config(recorded) if recorded.is_file() else None
    adapter = folder if (folder / LORA_FILE).is_file() else None
    if config and not adapter and not (folder / "model_index.json").is_file():
        raise UsageError(f"--model {folder}: this run has exported nothing yet; the same training command finishes it")
    base = config.model if config and adapter else options.model
    output = Path(options.output).expanduser() if options.output else (folder if config else Path()) / "samples"
    _draw(options, base, adapter if config else None, config, output)


def _draw(options: Options, base: str, adapter: Path | None, config: TrainConfig | None, output: Path) -> None:
    """Load `base`, add the LoRA in the folder `adapter`, and draw as the run's `config` trained."""
    import torch
    from safetensors import SafetensorError

    from finetune.models.conditioners import ClipConditioner, spelt_words
    from finetune.models.loading import check_resolution, load_model, quiet_libraries
    from finetune.models.locate import locate
    from finetune.precision import DTYPES, resolve_precision
    from finetune.results.sampling import draw_pictures, save_picture

    quiet_libraries()
    found = locate(base)
    if found.folder is None:
        raise UsageError("--model ddpm is untrained; give the folder of a run")
    if found.family.latent == (not options.prompt):
        raise UsageError("give --prompt" if found.family.latent else f"--prompt cannot be used: {base} takes no text")
    resolution = options.resolution or (config.resolution if config else None) or found.resolution
    check_resolution(found, resolution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = DTYPES[resolve_precision(options.mixed_precision, device, small=False)]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}") from error
    model = load_model(
        found,
        resolution=resolution,
        dtype=half or torch.float32,
        prediction_type=config.prediction_type if config else None,
        max_token_length=config.max_token_length if config else 77,
        clip_skip=config.clip_skip if config else None,
    )
    if found.family.name == "tiny":
        assert isinstance(model.conditioner, ClipConditioner)
        if spelt := spelt_words(model.conditioner.tokenizer, options.prompt):
            print(f"tiny does not know, and spells: {', '.join(spelt)}", file=sys.stderr)
    if adapter:
        try:
            model.unet.load_lora_adapter(adapter, prefix="unet", weight_name=LORA_FILE)  # pyright: ignore[reportAttributeAccessIssue]
        except SafetensorError as error:
            raise ModelError(f"{adapter / LORA_FILE} cannot be loaded: {error}") from error
    with torch.autocast(device.type, dtype=half, enabled=half is not None):
        rows = draw_pictures(
            model.to(device),
            options.prompt or ("",),
            range(options.seed, options.seed + options.num_images),
            resolution=resolution,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            negative_prompt=options.negative_prompt,
        )
    for number, (prompt, row) in enumerate(zip(options.prompt or ("unconditional",), rows, strict=True), start=1):
        place = f"{number}-" if len(rows) > 1 else ""  # two prompts may differ in what a file name cannot hold
        for seed, picture in enumerate(row, start=options.seed):
            path = output / f"{place}{_slug(prompt)}-{seed}.png"
            save_picture(picture, path)
            print(path)


def _slug(prompt: str) -> str:
    """A prompt as the start of a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "empty"

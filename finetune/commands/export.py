"""finetune-unet export: write any checkpoint of a run in the format that a program reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.atomic_io import new_file
from finetune.config import load_resolved
from finetune.errors import UsageError
from finetune.text import join_limited, pluralize

Format = Literal["kohya", "peft", "diffusers", "single-file", "unet"]
Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the result of a run in another format. Every file is loaded back and compared."""

    run: str
    """Run folder."""
    format: Format
    """kohya: a LoRA for ComfyUI, A1111, Forge. peft: a LoRA for diffusers. diffusers: a pipeline folder. single-file: a
    checkpoint in one file. unet: the folder of a UNet. In the last three, a LoRA is merged into the base model."""
    to: str
    """File or folder to write; it must not exist."""
    step: int | None = None
    """Step of the checkpoint to export. Default: the newest."""
    ema: bool = True
    """Export the EMA weights, if the run kept any; --no_ema: the trained weights."""
    precision: Precision = "fp32"
    """Number format of the file."""
    base: str | None = None
    """For single-file: a checkpoint in one file, from which tensors are copied that a diffusers folder does not have
    (tables of the schedule, the original EMA weights, the last block of Stable Diffusion 2's text encoder)."""

    variant: Literal["fp16"] | None = None
    """For diffusers with --precision fp16: name the files for `from_pretrained(folder, variant="fp16")`."""
    allow_changed: tuple[Literal["model"], ...] = ()
    """model: export even if the base model, its VAE or its text encoder have changed since the run."""


def run(options: Options) -> None:
    """Write the export, prove it, and print its path.

    Raises:
        UsageError: no such run or checkpoint, a place that is taken, or a form that the run cannot take.
        RunError: what was written does not load back to the same; it is kept beside, named `.rejected`.
    """
    folder = Path(options.run).expanduser()
    if not (folder / "config.toml").is_file():
        raise UsageError(f"--run {folder}: no run folder")
    config = load_resolved(folder / "config.toml")
    if options.format in ("kohya", "peft") and config.method == "full":
        raise UsageError(f"--format {options.format}: this run trained every weight, and has no LoRA")
    if options.base is not None and options.format != "single-file":
        raise UsageError("--base goes with --format single-file")
    if options.variant is not None and (options.format, options.precision) != ("diffusers", options.variant):
        raise UsageError(f"--variant {options.variant} goes with --format diffusers --precision {options.variant}")
    to = new_file("--to", options.to)
    from finetune.models.single_file import inspect
    from finetune.results.export_formats import write_verified
    from finetune.run.exports import left_out, load_trained

    base = None if options.base is None else inspect(Path(options.base).expanduser(), "--base")
    model, metadata = load_trained(config, folder, options.step, ema=options.ema, allow_changed=options.allow_changed)
    write_verified(
        model, to, options.format, precision=options.precision, metadata=metadata, base=base, variant=options.variant
    )
    if options.format == "single-file" and base is None and (left := left_out(config, to)):
        print(f"dropped: {pluralize(len(left), 'tensor')} of {config.model}: {join_limited(left)}; --base copies them")

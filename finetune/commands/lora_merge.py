"""finetune-unet lora merge: merge LoRA files into a model's weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.atomic_io import new_file
from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Merge LoRA files of any type into a model. The result is loaded back and compared."""

    model: str
    """Base model, as for training."""
    file: tuple[str, ...]
    """LoRA files in kohya's or peft's format."""
    strength: tuple[float, ...] = ()
    """Strength of each file. Default: 1."""
    to: str
    """File or folder to write; it must not exist."""
    format: Literal["single-file", "diffusers", "unet"] = "single-file"
    """single-file: a checkpoint in one file. diffusers: a pipeline folder. unet: the folder of a UNet."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the result."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint in one file, as for training."""


def run(options: Options) -> None:
    """Merge, write and prove.

    Raises:
        UsageError: no such file, as many strengths as files are not given, or a place that is taken.
        ModelError: a file is damaged, or for another model.
        RunError: what was written does not load back to the same; it is kept as `.rejected`.
    """
    strengths = options.strength or (1.0,) * len(options.file)
    if len(strengths) != len(options.file):
        raise UsageError(f"{len(options.file)} files and {len(strengths)} strengths: give one for each file")
    to = new_file("--to", options.to)
    from finetune.models.loading import load_model
    from finetune.models.lora_tools import merge_files, open_lora
    from finetune.results.export_formats import write_verified
    from finetune.text import pluralize

    for file in options.file:
        open_lora(Path(file).expanduser(), options.model)  # before gigabytes are loaded in vain
    model = load_model(options.model, tokenizer=options.tokenizer)
    merged = merge_files(model.unet, options.file, strengths, options.model, option="--file")
    for (path, lora), strength in zip(merged, strengths, strict=True):
        left = f"; {pluralize(lora.text_tensors, 'tensor')} for text encoders left out" if lora.text_tensors else ""
        print(f"{path}: {pluralize(len(lora.layers()), 'layer')}, strength {strength:g}{left}")
    write_verified(model, to, options.format, precision=options.precision, metadata={})

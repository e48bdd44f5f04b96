"""finetune-unet lora convert: convert a LoRA file to the other format, or to another number format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.atomic_io import new_file


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a LoRA file to the format that a program reads. Tensors of text encoders are dropped, and counted."""

    file: str
    """LoRA file in kohya's or peft's format."""
    to: str
    """File to write; it must not exist."""
    format: Literal["kohya", "peft"] = "kohya"
    """kohya: for ComfyUI, A1111, Forge. peft: for diffusers."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the file."""
    model: str | None = None
    """Model that the LoRA is for, if its tensors do not show that."""


def run(options: Options) -> None:
    """Write the file and prove it. Raises UsageError and ModelError for what cannot be read, RunError for the proof."""
    to = new_file("--to", options.to)
    from finetune.models.lora import Adapter
    from finetune.models.lora_tools import check_layers, layers_for, open_lora, write_lora
    from finetune.models.tensor_file import DTYPES
    from finetune.text import pluralize

    path = Path(options.file).expanduser()
    lora = open_lora(path, options.model)
    check_layers(path, lora, options.model)
    names = layers_for(lora, options.model).kohya_names
    write_lora(to, lora, options.format, DTYPES[options.precision], Adapter.read_metadata(path), names=names)
    several = any(len(set(numbers.values())) > 1 for numbers in (lora.ranks(), lora.alphas))
    if options.format == "kohya" and lora.kind == "lora" and several:
        print("note: its layers have different ranks or alphas, which diffusers 0.32 reads wrongly")
    left = f"; {pluralize(lora.text_tensors, 'tensor')} for text encoders left out" if lora.text_tensors else ""
    print(f"{to}: {pluralize(len(lora.layers()), 'layer')} in {options.format}'s layout, read back and compared{left}")

"""finetune-unet lora resize: reduce the rank of a LoRA."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.atomic_io import new_file
from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Reduce the rank of a LoRA by SVD of each layer. A LoHa or LoKr becomes a LoRA."""

    file: str
    """LoRA file in kohya's or peft's format."""
    to: str
    """File to write, in kohya's format; it must not exist."""
    rank: int | None = None
    """Maximum rank of a layer."""
    energy: float = 1.0
    """Keep the fewest singular values of each layer whose squares sum to this share, such as 0.95."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the file."""
    model: str | None = None
    """Model that the LoRA is for, if its tensors do not show that."""


def run(options: Options) -> None:
    """Write the file, prove it, and say what was kept. Raises as `lora convert` does, and UsageError for no target."""
    check_target(options.rank, options.energy)
    to = new_file("--to", options.to)
    from finetune.models.lora import Adapter
    from finetune.models.lora_tools import check_layers, layers_for, open_lora, shortened, write_lora
    from finetune.models.tensor_file import DTYPES

    path = Path(options.file).expanduser()
    lora = open_lora(path, options.model)
    check_layers(path, lora, options.model)
    layers = layers_for(lora, options.model)
    made, energy = shortened(lora, None if lora.kind == "lora" else layers.shapes, options.rank, options.energy)
    precision = DTYPES[options.precision]
    write_lora(to, made, "kohya", precision, Adapter.read_metadata(path), names=layers.kohya_names)
    ranks = sorted(rank for rank in made.ranks().values() if rank)
    print(f"{to}: rank {ranks[0]} to {ranks[-1]}, {energy:.2%} of the squares of what it adds, read back and compared")


def check_target(rank: int | None, energy: float) -> None:
    """Raise UsageError unless rank or energy ask for something that there is."""
    if rank is None and energy == 1.0:
        raise UsageError("give --rank, or --energy below 1")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: expected 1 or more")
    if not 0 < energy <= 1:
        raise UsageError(f"--energy {energy:g}: expected above 0, up to 1")

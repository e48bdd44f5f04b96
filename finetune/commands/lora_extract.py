"""finetune-unet lora extract: write the change of a full fine-tune as a LoRA."""

from dataclasses import dataclass
from typing import Literal

from finetune.atomic_io import new_file
from finetune.commands.lora_resize import check_target
from finetune.errors import UsageError

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the difference between the UNets of two models as a LoRA in kohya's format (by SVD of each layer)."""

    model: str
    """Trained model: a folder or a checkpoint in one file."""
    base: str
    """Model that it was trained from."""
    to: str
    """File to write; it must not exist."""
    rank: int | None = 32
    """Maximum rank of a layer."""
    energy: float = 1.0
    """Keep the fewest singular values of each layer whose squares sum to this share, such as 0.95."""
    conv: bool = True
    """Include convolutions; --no_conv: attention, feed-forward and projections only."""
    precision: Precision = "fp16"
    """Number format of the file."""


def run(options: Options) -> None:
    """Write the file, prove it, and say how much of the change it holds.

    Raises:
        UsageError: the models are of different kinds, equal, or the place is taken.
        ModelError: a model cannot be loaded.
    """
    check_target(options.rank, options.energy)
    to = new_file("--to", options.to)
    import torch

    from finetune.models.lora_keys import layers_of
    from finetune.models.lora_tools import difference, write_lora
    from finetune.models.model_info import locate
    from finetune.models.source import open_source
    from finetune.models.tensor_file import DTYPES
    from finetune.results.lora_metadata import architecture
    from finetune.text import pluralize

    places = {"--model": locate(options.model), "--base": locate(options.base)}
    for name, model_info in places.items():
        if model_info.scratch or not model_info.family.latent:
            raise UsageError(f"{name} {model_info.name}: a pixel-space model takes no LoRA")
    tuned, base = (open_source(model_info).unet(torch.float32).state_dict() for model_info in places.values())
    if [(name, t.shape) for name, t in tuned.items()] != [(name, t.shape) for name, t in base.items()]:
        raise UsageError(f"--model {options.model} and --base {options.base} are models of different kinds")
    layers = [name.removesuffix(".weight") for name, t in tuned.items() if name.endswith(".weight") and t.ndim > 1]
    if not options.conv:
        layers = [layer for layer in layers if tuned[f"{layer}.weight"].shape[2:].numel() == 1]
    made, energy, left = difference(tuned, base, layers, options.rank, options.energy)
    family = places["--base"].family
    version = architecture(family.layout or family.name, "epsilon")[0]
    metadata = {"ss_base_model_version": version, "ss_output_name": to.stem, "modelspec.title": to.stem}
    names = layers_of(open_source(places["--base"]).config("unet")).kohya_names
    write_lora(to, made, "kohya", DTYPES[options.precision], metadata, names=names)
    more = f"; {pluralize(left, 'tensor')} that no LoRA can hold changed too" if left else ""
    print(f"{to}: {pluralize(len(made.alphas), 'layer')}, {energy:.2%} of the squares of the change, read back{more}")

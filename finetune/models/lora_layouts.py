"""The two layouts in which LoRA files are passed around, and the way between them.

peft, read by diffusers: `unet.MODULE.lora_A.weight` and `.lora_B.weight`, rank and alpha in the metadata.
kohya, read by sd-scripts, ComfyUI, A1111, Forge and diffusers: `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`
and a number `.alpha` for each MODULE, whose dots are underscores.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from finetune.errors import ModelError

PEFT_PREFIX = "unet."
KOHYA_PREFIX = "lora_unet_"
_SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
"""peft's name of a tensor -> kohya's."""


def to_kohya(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The tensors of a peft file under kohya's keys, with alpha beside them.

    Args:
        state: peft key -> tensor.
        alpha: the update is scaled by alpha / rank.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, suffix = _parted(key.removeprefix(PEFT_PREFIX), _SUFFIXES)
        name = KOHYA_PREFIX + module.replace(".", "_")
        found[f"{name}.{_SUFFIXES[suffix]}"] = tensor
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def from_kohya(state: Mapping[str, Tensor], modules: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a kohya file under peft's keys, and alpha of each module.

    Args:
        state: kohya key -> tensor.
        modules: names of the UNet's layers; the underscores of a key could be dots or underscores.

    Raises:
        ModelError: a key belongs to none of the layers, or is of another kind.
    """
    by_name = {KOHYA_PREFIX + module.replace(".", "_"): module for module in modules}
    back = {theirs: ours for ours, theirs in _SUFFIXES.items()}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name, _, suffix = key.partition(".")
        if name not in by_name or suffix not in {*back, "alpha"}:
            raise ModelError(f"{key}: no LoRA tensor for this UNet")
        if suffix == "alpha":
            alphas[by_name[name]] = tensor.item()
        else:
            tensors[f"{PEFT_PREFIX}{by_name[name]}.{back[suffix]}"] = tensor
    return tensors, alphas


def _parted(key: str, suffixes: Iterable[str]) -> tuple[str, str]:
    """ "MODULE.SUFFIX" -> its two parts. Raises ModelError for a tensor of another kind."""
    for suffix in suffixes:
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    raise ModelError(f"{key}: no tensor of a LoRA")

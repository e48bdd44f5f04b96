"""Which layers of a UNet are trained: by endings of their names, patterns, or presets."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from finetune.errors import UsageError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_IN_AND_OUT = ("proj_in", "proj_out")
RESIDUAL_BLOCKS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.*.conv", "upsamplers.*.conv")
"""The layers that sd-scripts adds for `conv_dim`: those of residual blocks and between levels."""
LAYER_PRESETS: Mapping[str, Sequence[str]] = {
    "attn-only": _ATTENTION,
    "attn-mlp": (*_ATTENTION, *_FEED_FORWARD, *_IN_AND_OUT),
    "full": (
        *_ATTENTION,
        *_FEED_FORWARD,
        *_IN_AND_OUT,
        *RESIDUAL_BLOCKS,
        "conv_in",
        "conv_out",
        "linear_1",
        "linear_2",
    ),
}
"""Name of a choice of layers -> endings and patterns of their names."""


def layers_to_adapt(
    unet: nn.Module, targets: Sequence[str], *, residual_blocks: bool = False
) -> tuple[list[str], dict[str, nn.Module]]:
    """The layers that targets name: as peft takes them, and by their names.

    Args:
        unet: has the layers.
        targets: endings of names, patterns with *, or names of `LAYER_PRESETS`.
        residual_blocks: add `RESIDUAL_BLOCKS`.

    Raises:
        UsageError: one names no layer.
    """
    if isinstance(targets, str):
        targets = [targets]
    patterns = [ending for target in targets for ending in LAYER_PRESETS.get(target, (target,))]
    patterns += [ending for ending in RESIDUAL_BLOCKS if residual_blocks and ending not in patterns]
    preset = {ending for endings in LAYER_PRESETS.values() for ending in endings}
    named = dict(unet.named_modules())
    endings: list[str] = []
    layers: dict[str, nn.Module] = {}
    for target in patterns:
        matched = {name: layer for name, layer in named.items() if names(target, name)}
        if not matched and target not in (*preset, *RESIDUAL_BLOCKS):  # a small UNet has not every layer of a preset
            raise UsageError(f"lora_target_modules: the UNet has no layer named like {target!r}")
        layers |= matched
        endings += [*matched] if "*" in target else [target] * bool(matched)
    return list(dict.fromkeys(endings)), layers


def names(target: str, layer: str) -> bool:
    """Whether a target, an ending or a pattern, names a layer."""
    if "*" in target:
        return fnmatchcase(layer, target) or fnmatchcase(layer, f"*.{target}")
    return layer == target or layer.endswith(f".{target}")


def train_only(unet: nn.Module, targets: Sequence[str]) -> None:
    """Freeze all of a UNet but the layers that targets name, and what is inside of them.

    Raises:
        UsageError: one names no layer that has weights.
    """
    unet.requires_grad_(False)
    for target in targets:
        chosen = [layer for name, layer in unet.named_modules() if names(target, name)]
        if not any(True for layer in chosen for _ in layer.parameters()):
            raise UsageError(f"train_modules: the UNet has no layer named like {target!r}")
        for layer in chosen:
            layer.requires_grad_(True)

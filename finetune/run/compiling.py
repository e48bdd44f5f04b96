"""torch.compile of a UNet's blocks: fewer and larger kernels, for a compile time at the first steps."""

from typing import Any

import torch
from torch import nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""What a UNet repeats. Blocks of one shape share their code, where the whole UNet would be compiled as one piece."""

_SHAPES = 64
"""Shapes of blocks that are compiled; torch gives up at 8, and a UNet's residual blocks have more."""

PAYS_AFTER = 10_000
"""Steps of training after which a GPU has won back what compiling takes: an H100 two minutes, for a tenth of a step."""


def compile_pays(device: torch.device, steps: int, *, small: bool) -> bool:
    """Whether a run of so many steps ends earlier with compiled blocks; `small` networks gain nothing worth it."""
    return device.type == "cuda" and not small and steps >= PAYS_AFTER


def compile_blocks(unet: nn.Module) -> str | None:
    """Let the repeated blocks of `unet` be compiled when they first run.

    Returns:
        None, or in a line why this machine cannot: a compiler is missing, or the GPU is too old. Nothing is changed
        then.
    """
    try:
        torch.compile(_probe)(torch.ones(8, device=next(unet.parameters()).device))
    except RuntimeError as error:  # of dynamo, inductor and triton alike
        return str(error).strip().splitlines()[0]
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    dynamo.suppress_errors = True  # a block that cannot be compiled runs as it is, with a warning
    # Convolutions are fastest with channels last, but torch's own group norm turns them over and back: with compiled
    # ones only is it worth it.
    nn.Module.to(unet, memory_format=torch.channels_last)
    for module in unet.modules():
        if type(module).__name__ in _BLOCKS:
            module.compile()
    return None


def is_compiled(unet: nn.Module) -> bool:
    """Whether `compile_blocks` did it."""
    return any(module._compiled_call_impl is not None for module in unet.modules())


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1

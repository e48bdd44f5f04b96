"""PiSSA: a LoRA that starts at the principal part of each layer's weight instead of at zero (Meng et al. 2024)."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad

START = "start"
"""Name of the frozen adapter that takes the start away."""

_OVERSAMPLING, _POWER_ITERATIONS = 8, 16
"""Of the randomized decomposition (Halko et al. 2011, algorithms 4.4 and 5.1)."""


def start_at_principal_part(unet: Any, name: str) -> None:
    """Set a LoRA to the largest singular values of its layers' weights, and add a frozen one that takes them away.

    In the paper the base keeps W - scale B A (Meng et al. 2024, "PiSSA", eq. 2 to 4). Here the base keeps W, and a
    second adapter adds -scale B A. So the sum of both adapters is an exact update of W, whatever its number format, and
    the model without adapters is still the base. An exported file has both, with twice the rank.

    Args:
        unet: of diffusers, with the LoRA `name`; torch's global generator is drawn from.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # there is an adapter already
        unet.add_adapter(replace(unet.peft_config[name]), START)
    for layer in _layers(unet):
        weight = layer.get_base_layer().weight
        a, start_a = layer.lora_A[name].weight, layer.lora_A[START].weight
        b, start_b = layer.lora_B[name].weight, layer.lora_B[START].weight
        if not weight.is_meta:
            down, up = _principal_part(weight.detach(), rank=a.shape[0], scale=layer.scaling[name])
            a.data, b.data = down.reshape(a.shape), up.reshape(b.shape)
            start_a.data, start_b.data = a.data.clone(), -b.data
    activate(unet, name)


def _principal_part(weight: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), fp32: scale B A is the best approximation of the weight that has this rank.

    Where the weight has a lower rank, as one of few outputs, the rest is zero.
    """
    matrix = weight.float().flatten(1)
    found = torch.svd_lowrank(matrix, q=min(rank + _OVERSAMPLING, *matrix.shape), niter=_POWER_ITERATIONS)
    u, s, v = (part[..., :rank] for part in found)
    root = (s / scale).sqrt()
    missing = rank - len(s)
    return pad((v * root).T, (0, 0, 0, missing)), pad(u * root, (0, missing))


def activate(unet: Any, name: str) -> None:
    """Switch an adapter on, with its start where it has one; only the adapter learns."""
    unet.set_adapters([name, START] if START in unet.peft_config else name)
    for parameter in start_of(unet).values():
        parameter.requires_grad_(False)


def start_of(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the start; empty for an adapter that starts at zero.

    Another machine would compute it to other bits, so a checkpoint has to hold it.
    """
    return {name: parameter for name, parameter in unet.named_parameters() if f".{START}." in name}


def with_start(unet: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by peft's keys, with those of its start as further ranks."""
    if START not in unet.peft_config:
        return weights
    start = get_peft_model_state_dict(unet, adapter_name=START)
    return {key: torch.cat([tensor, start[key]], dim=0 if ".lora_A." in key else 1) for key, tensor in weights.items()}


def _layers(unet: nn.Module) -> Iterator[Any]:
    return (module for module in unet.modules() if isinstance(module, LoraLayer))

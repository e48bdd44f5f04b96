"""The forward pass of a LoRA layer as three matrix products, without the overhead of peft."""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def lean(network: nn.Module, name: str) -> None:
    """Let peft's LoRA layers on linear ones compute `base(x) + scale B(A(x))` by adding into the base's own output.

    peft multiplies the update by its scale and adds it in two passes over the layer's whole output, and keeps another
    copy for the backward pass. The layers stay peft's: names, settings and files are as before, and whatever else is
    asked of them (DoRA, dropout, other adapters beside, autocast) they do as peft does it.

    Args:
        network: has the adapter.
        name: of the adapter.
    """
    for layer in network.modules():
        if isinstance(layer, Linear) and type(layer.base_layer) is nn.Linear:
            layer.forward = MethodType(_forward_of(name), layer)


def _forward_of(name: str) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _is_plain(self, name, x):
            return Linear.forward(self, x, *args, **kwargs)
        rows = x.flatten(0, -2)
        # `rows` has two dimensions so that nothing but the product itself is a view of what is added to.
        result = self.base_layer(rows)
        result.addmm_(self.lora_A[name](rows), self.lora_B[name].weight.t(), alpha=self.scaling[name])
        return result.unflatten(0, x.shape[:-1])

    return forward


def _is_plain(layer: Any, name: str, x: Tensor) -> bool:
    """Whether the layer has this adapter alone, as a LoRA without dropout, in the dtype of its input."""
    return (
        layer.active_adapters == [name]
        and not layer.disable_adapters
        and not layer.merged_adapters
        and name in layer.lora_A
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and x.dtype == layer.lora_A[name].weight.dtype == layer.base_layer.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )

"""Dropout of ranks and of whole layers of a LoRA, as sd-scripts has it (`networks/lora.py`, `LoRAModule.forward`)."""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class RankDropout(nn.Dropout):
    """Drops single ranks of an update for each example, and scales the others up."""

    def forward(self, input: Tensor) -> Tensor:
        """input: what the matrix A makes, (B, tokens, rank) of a linear layer or (B, rank, H, W) of a convolution."""
        if not self.training or self.p == 0:
            return input
        channels = 1 if input.dim() == 4 else -1
        shape = [1] * input.dim()
        shape[0], shape[channels] = input.shape[0], input.shape[channels]
        mask = torch.rand(shape, device=input.device) >= self.p
        return input * mask.to(input.dtype) / (1 - self.p)


class ModuleDropout(nn.Dropout):
    """Drops the whole update of a layer; the others are not scaled."""

    def forward(self, input: Tensor) -> Tensor:
        """input: the update of the layer's output."""
        if not self.training or self.p == 0:
            return input
        return input * (torch.rand((), device=input.device) >= self.p).to(input.dtype)


def add_dropout(network: nn.Module, name: str, *, ranks: float, modules: float) -> None:
    """Drop ranks and whole layers of an adapter while it is trained.

    Args:
        network: has a LoRA.
        name: of the adapter.
        ranks: share of the ranks, in [0, 1).
        modules: share of the layers, in [0, 1).
    """
    for layer in [layer for layer in network.modules() if isinstance(layer, LoraLayer)]:
        for matrix, dropout in ((layer.lora_A[name], RankDropout(ranks)), (layer.lora_B[name], ModuleDropout(modules))):
            matrix.add_module("dropout", dropout)  # so that it follows `train` and `eval`
            matrix.register_forward_hook(_dropping)


def _dropping(matrix: nn.Module, _: Any, output: Tensor) -> Tensor:
    dropout = matrix.get_submodule("dropout")
    return dropout(output)

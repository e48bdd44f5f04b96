"""Prior prediction: class images are trained towards the untrained model's output.

Their own noise, as the prior loss of DreamBooth has it (Ruiz et al. 2022, "DreamBooth", eq. 2), also teaches what is
particular about those pictures; the model's own answer teaches nothing new, and so holds it where it was.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.batch import map_tensors
from finetune.training.micro_batch import MicroBatch
from finetune.training.objective import prediction

Prior = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""x_t (B, C, H, W), t (B,) and the UNet's keyword arguments -> what the untrained model answers, fp32."""


def untrained(unet: Any, dtype: torch.dtype | None, *, adapter: bool) -> Prior:
    """The model as it is now, whatever is trained of it later.

    Args:
        unet: of diffusers, on its device.
        dtype: of the copy that is kept of it; None: its own.
        adapter: only an adapter is going to learn: it is switched off for an answer, and nothing is copied.
    """
    if not adapter:
        copy = nn.Module.to(deepcopy(unet), dtype or unet.dtype).requires_grad_(False).eval()
        return torch.no_grad()(lambda x_t, t, cond: prediction(copy, x_t, t, cond))

    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]

    @torch.no_grad()
    def answer(x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        # `disable_adapters` looks through all modules, which takes longer than a forward pass of a small UNet.
        for layer in layers:
            layer._disable_adapters = True
        try:
            return prediction(unet, x_t, t, cond)
        finally:
            for layer in layers:
                layer._disable_adapters = False

    return answer


def with_prior(part: MicroBatch, prior: Prior | None) -> MicroBatch:
    """Return the micro-batch with the untrained model's output as the target of its class pictures.

    Args:
        part: drawn by a `NoisePrediction`.
        prior: None, or no class pictures in it: it is answered as it is.
    """
    rows = part.prior
    if rows is None or prior is None:
        return part
    x = part.drawn.x_t if part.unet_channels is None else torch.cat([part.drawn.x_t, part.unet_channels], dim=1)
    answer = prior(x[rows], part.drawn.t[rows], map_tensors(lambda tensor: tensor[rows], part.cond))
    target = part.drawn.target.index_copy(0, rows, answer.to(part.drawn.target.dtype))
    return replace(part, drawn=replace(part.drawn, target=target), prior=None)

"""LoRA through peft: a small trainable adapter beside frozen layers (Hu et al. 2021, eq. 3)."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch import nn

from finetune.errors import UsageError

ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def add_lora(
    unet: UNet2DConditionModel | UNet2DModel,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_AND_FEED_FORWARD,
    seed: int = 0,
) -> None:
    """Freeze `unet` and add an adapter whose weights, in fp32, are all that learns.

    Args:
        unet: a diffusers UNet; it computes the same as before until the first step (B starts at zero).
        rank: rank of the update, from 1 to that of the widest adapted layer.
        alpha: the update is scaled by alpha / rank; default: rank.
        dropout: in [0, 1), on the adapter's input.
        target_modules: endings of the names of linear or convolution layers.
        seed: decides A's initial values, normal with standard deviation 1 / rank.

    Raises:
        UsageError: a pixel-space UNet, `target_modules` names no layer, or one that takes no adapter, or a rank that
            no layer can have.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise UsageError("LoRA needs the UNet of a latent model; train every weight of a pixel-space UNet instead")
    matched = {t: [m for n, m in unet.named_modules() if n == t or n.endswith(f".{t}")] for t in target_modules}
    missing = [target for target, layers in matched.items() if not layers]
    if missing:
        raise UsageError(f"lora_target_modules: the UNet has no layer named like {missing[0]!r}")
    weights = [getattr(layer, "weight", None) for layers in matched.values() for layer in layers]
    widest = max((min(w.shape[0], w[0].numel()) for w in weights if isinstance(w, torch.Tensor)), default=rank)
    if not 1 <= rank <= widest:
        raise UsageError(f"rank = {rank}: allowed are 1 to {widest}, the highest rank that an adapted layer has")
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # pyright: ignore[reportArgumentType] # fractions work too
        lora_dropout=dropout,
        target_modules=list(target_modules),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            unet.add_adapter(config)
        except ValueError as error:
            raise UsageError(
                f"lora_target_modules {', '.join(target_modules)}: {str(error).splitlines()[0]}"
            ) from error
    for parameter in trainable(unet):
        parameter.data = parameter.data.float()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, in the module's own order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]

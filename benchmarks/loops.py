"""What the benchmarks train: UNets of real shape with random weights, random latents, and the bare loop beside ours."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

import finetune as ft
from finetune.data.prefetch import ahead
from finetune.data.sampler import Turns
from finetune.models.encoders import VaeEncoder
from finetune.models.lora_keys import UNETS
from finetune.options import ATTENTION_AND_FEED_FORWARD
from finetune.training.optimizers import make_optimizer

Step = Callable[[], object]
LEARNING_RATE = 1e-5


def unet_config(name: str, width: int = 320) -> dict[str, Any]:
    """Arguments of a UNet of Stable Diffusion 1.5's shape, its first level `width` wide, or of SDXL's."""
    if name == "sd15":
        return {
            "sample_size": 64,
            "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        }
    return {"sample_size": 128, **UNETS["sdxl"]}


def schedule() -> DDPMScheduler:
    """Stable Diffusion's."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def conditions(name: str, batch: int) -> dict[str, Any]:
    """Random embeddings for a UNet of this kind."""
    if name == "sd15":
        return {"encoder_hidden_states": torch.randn(batch, 77, 768)}
    added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
    added["time_ids"] = added["time_ids"].repeat(batch, 1)
    return {"encoder_hidden_states": torch.randn(batch, 77, 2048), "added_cond_kwargs": added}


class LowRank(nn.Module):
    """A linear layer and a low-rank update of it, by hand."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        where: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **where) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, **where))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return self.base(rows).addmm_(F.linear(rows, self.a), self.b.t()).unflatten(0, x.shape[:-1])


def with_low_rank_layers(unet: nn.Module, rank: int) -> None:
    """Freeze the UNet and adapt the layers that our LoRA adapts."""
    unet.requires_grad_(False)
    layers = [(name, layer) for name, layer in unet.named_modules() if name.endswith(ATTENTION_AND_FEED_FORWARD)]
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(owner), leaf, LowRank(layer, rank))


def bare_loop(unet: nn.Module, x_t: Tensor, t: Tensor, noise: Tensor, cond: dict[str, Any], rank: int | None) -> Step:
    """b: what no trainer can leave out, at its best: weights, gradients, moments in one dtype, inputs that lie ready.

    It keeps no fp32 masters, so that small updates are lost in half precision: it is a measure, and no trainer.

    Args:
        unet: on its device, in the dtype to compute in.
        x_t, t, noise, cond: there, too.
        rank: of hand-written low-rank layers; None: every weight learns.
    """
    if rank is not None:
        with_low_rank_layers(unet, rank)
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, fused=x_t.device.type != "meta")

    def step() -> None:
        prediction = unet(x_t, t, **cond).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class RandomLatents:
    """Encoded pictures that never were: what our loader draws from, without a VAE."""

    needs_workers = False

    def __init__(self, name: str, side: int, batch: int):
        self.name, self.side = name, side
        self.ids: Sequence[str] = [str(number) for number in range(4 * batch)]
        self.shapes: Sequence[int] = [0] * len(self.ids)
        self.repeats: Sequence[int] = [1] * len(self.ids)
        self.weights: Sequence[float] = [1.0] * len(self.ids)
        self.turns: Sequence[Turns] = ()
        self.visits = self
        self.stored = torch.randn(8, side // 8, side // 8)

    def ensure_encoded(self, examples: Sequence[int]) -> None:
        """All are in memory."""

    def load(self, index: int, key: int) -> Tensor:
        return self.stored + index

    def collate(
        self, indices: Sequence[int], keys: Tensor, loaded: Sequence[Tensor], progress: object = None
    ) -> ft.Batch:
        time_ids = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]] * len(indices))
        ids, weight = tuple(self.ids[i] for i in indices), torch.ones(len(indices))
        return ft.Batch(
            latent_params=torch.stack(list(loaded)),
            cond=conditions(self.name, len(indices)),
            keys=keys,
            time_ids=time_ids,
            ids=ids,
            weight=weight,
        )


def latent_sampler() -> Any:
    """The part of `VaeEncoder` that a step uses, without the VAE."""
    config = SimpleNamespace(scaling_factor=0.18215, shift_factor=0.0)
    config.sample = VaeEncoder.sample.__get__(config)
    return config


def our_trainer(
    unet: Any, encoder: Any, objective: ft.NoisePrediction, precision: torch.dtype | None, method: str = "lora"
) -> ft.Trainer:
    """The Trainer as `fine_tune` makes it for lora or full; bf16: with --full_bf16 and Adafactor, fused: updates in the
    backward pass, too."""
    masters, fused = method in ("lora", "full"), method == "fused"
    return ft.Trainer(
        unet,
        encoder,
        objective,
        make_optimizer("adamw" if masters else "adafactor", ft.trainable(unet), learning_rate=LEARNING_RATE),
        learning_rate=lambda step: LEARNING_RATE,
        precision=precision,
        max_grad_norm=0.0 if fused else 1.0,
        masters=masters,
        in_backward=fused,
        cuda_graphs=True,
    )


@contextmanager
def our_loop(trainer: ft.Trainer, batches: Iterator[ft.Batch]) -> Iterator[Step]:
    """c: inside, a step of the loop of `fine_tune` without its log, samples and checkpoints."""
    with ahead(trainer.prepare(batch) for batch in batches) as steps:
        yield lambda: trainer.run_prepared(next(steps))


def unet_of(name: str, device: torch.device, dtype: torch.dtype, width: int = 320) -> UNet2DConditionModel:
    """A UNet with random weights, made where it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**unet_config(name, width))
    nn.Module.to(unet, dtype)
    return unet

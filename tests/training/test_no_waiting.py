"""Nothing in a step asks the device for a value. (On a GPU torch itself watches: tests/test_gpu.py.)"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.batch import Batch
from finetune.models.encoders import PixelEncoder
from finetune.models.lora import add_lora, trainable
from finetune.training.ema import Ema
from finetune.training.metrics import StepMetrics
from finetune.training.objective import Noised, NoisePrediction
from finetune.training.optim import make_optimizer
from finetune.training.trainer import Trainer

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero", "is_nonzero"}


class Waited(AssertionError):
    """A value was read."""


class NoReads(TorchFunctionMode):
    """Refuses what reads a tensor from Python."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))


class NoScalars(TorchDispatchMode):
    """Refuses what reads a tensor from inside of torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class Reading(NoisePrediction):
    """Reads its loss, as many a loop does."""

    def loss(self, unet: Any, noised: Noised, cond: Mapping[str, Any], extra: Tensor | None = None) -> Tensor:
        loss = super().loss(unet, noised, cond, extra)
        assert loss.mean().item() > 0
        return loss


def two_steps(method: str, optimizer: str, objective: type[NoisePrediction], precision: torch.dtype | None) -> None:
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    if method == "lora":
        add_lora(unet, rank=2)
    learned = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    trainer = Trainer(
        unet,
        PixelEncoder(),
        objective(DDPMScheduler()),
        make_optimizer(optimizer, trainable(unet), learning_rate=1e-3),
        micro_batch_size=1,
        precision=precision,
        ema=Ema(learned),
    )
    cond = {"encoder_hidden_states": torch.ones(2, 5, 32)}
    stored = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    batch = Batch(stored, cond, torch.arange(2), torch.zeros(2, 6), ("a", "b"), torch.ones(2))
    prepared = [trainer.prepare(batch) for _ in range(2)]
    made: list[StepMetrics] = []
    with NoReads(), NoScalars():
        for step in prepared:
            trainer._before = None  # that of the step before is read by then: it is there
            made.append(trainer.take(step))
    assert [metrics.step for metrics in made] == [1, 2]
    assert all(metrics.loss > 0 for metrics in made)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_step_waits_for_nothing(method: str, optimizer: str, precision: torch.dtype | None) -> None:
    two_steps(method, optimizer, NoisePrediction, precision)


def test_an_optimizer_that_cannot_be_told_on_the_device_waits_and_so_does_a_loss_that_is_read() -> None:
    with pytest.raises(Waited, match="tolist"):
        two_steps("lora", "adafactor", NoisePrediction, None)
    with pytest.raises(Waited, match="item"):
        two_steps("lora", "adamw", Reading, None)

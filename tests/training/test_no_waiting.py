"""Nothing in a step asks the device for a value. (On a GPU torch itself watches: tests/test_gpu.py.)"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.training.metrics import StepMetrics
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.objective import NoisedBatch
from tests.small_trainer import small_batch, small_trainer

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


class TrainDataLoader(NoisePrediction):
    """Reads its loss, as many a loop does."""

    def loss(
        self, unet: Any, noised: NoisedBatch, cond: Mapping[str, Any], unet_channels: Tensor | None = None
    ) -> Tensor:
        loss = super().loss(unet, noised, cond, unet_channels)
        assert loss.mean().item() > 0
        return loss


def two_steps(method: str, optimizer: str, objective: type[NoisePrediction], precision: torch.dtype | None) -> None:
    trainer = small_trainer(method, optimizer, objective, micro_batch_size=1, precision=precision)
    prepared = [trainer.prepare(small_batch()) for _ in range(2)]
    trainer._check_half_precision(prepared[0].parts[0])  # which waits, once for each size
    made: list[StepMetrics] = []
    with NoReads(), NoScalars():
        for step in prepared:
            trainer._before = None  # that of the step before is read by then: it is there
            made.append(trainer.run_prepared(step))
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
        two_steps("lora", "adamw", TrainDataLoader, None)

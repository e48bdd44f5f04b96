"""What is done about kernels that err in half precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from finetune.errors import RunError
from finetune.training import half_precision
from finetune.training.half_precision import check_share
from tests.small_trainer import small_batch, small_trainer

DOWN = "down_blocks.0.downsamplers.0.conv"


class WrongInHalf(nn.Conv2d):
    """A convolution whose bf16 kernel errs, as that of a CPU with AMX does on small inputs."""

    spoil: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        answer = super().forward(input)
        return self.spoil(answer) if input.dtype == torch.bfloat16 else answer


def spoil(unet: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
    conv = unet.get_submodule(DOWN)
    conv.__class__ = WrongInHalf
    conv.spoil = how


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda answer: 1.75 * answer, "is 75% off its answer in fp32"),
        (lambda answer: answer * float("nan"), "is not finite, as it is in fp32"),
        (
            lambda answer: answer * torch.rand(answer.shape, generator=SOURCE).mul(0.01).add(1).bfloat16(),
            "differs from run",
        ),
    ],
)
def test_a_layer_that_errs_in_half_precision_is_named_before_the_first_step(
    method: str, how: Callable[[Tensor], Tensor], what: str
) -> None:
    trainer = small_trainer(method, precision=torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in trainer.parameters.items()}
    spoil(trainer.unet, how)
    layer = rf"layer {DOWN} \(WrongInHalf, inputs 1 x 32 x 8 x 8\)"
    where = rf"the answer of the UNet's {layer} {what}.*, in bfloat16 on cpu .* with torch"
    with pytest.raises(RunError, match=where):
        trainer.step(small_batch())
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.parameters.items())


SOURCE = torch.Generator().manual_seed(0)


def test_in_fp32_nothing_is_compared() -> None:
    trainer = small_trainer("lora")
    spoil(trainer.unet, lambda answer: 1.75 * answer)
    trainer.step(small_batch())


def test_each_size_is_checked_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = half_precision.check_half_precision
    monkeypatch.setattr(
        "finetune.training.trainer.check_half_precision",
        lambda network, answer: checked.append(1) or check(network, answer),
    )
    trainer = small_trainer("lora", precision=torch.bfloat16)
    first = [trainer.step(small_batch()).loss for _ in range(2)]
    assert len(checked) == 1
    monkeypatch.setattr("finetune.training.trainer.TOLERANCES", {})
    unchecked = small_trainer("lora", precision=torch.bfloat16)
    assert [unchecked.step(small_batch()).loss for _ in range(2)] == first
    assert trainer.unet.training
    assert not any(module._forward_hooks for module in trainer.unet.modules())


def test_the_cost_is_small_in_runs_that_last() -> None:
    """Twelve photographs of three sizes, trained as they are by default."""
    assert check_share(sizes=3, steps=375, batch_size=4) == pytest.approx(18 / (18 + 4500))
    assert check_share(sizes=3, steps=375, batch_size=4) < 0.01

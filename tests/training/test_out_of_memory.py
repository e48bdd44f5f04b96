"""Memory that does not suffice for a micro-batch, as an objective that says so."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.batch import Batch, GlobalStep
from finetune.training.distributed import from_environment
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.trainer import Trainer
from tests.processes import together
from tests.small_trainer import small_batch, small_trainer


class Scarce(NoisePrediction):
    """From its third forward pass on it has memory for `room` examples at a time."""

    room = 8
    passes = 0
    on_cpu = False

    def loss(self, unet: Any, noised: Any, cond: Any, unet_channels: Tensor | None = None) -> Tensor:
        self.passes += 1
        if self.passes >= 3 and len(noised.t) > self.room:
            if self.on_cpu:
                torch.empty(2**60, dtype=torch.uint8)  # raises what it raises
            raise torch.OutOfMemoryError("not enough")
        return super().loss(unet, noised, cond, unet_channels)


def eight() -> Batch:
    one = small_batch()
    cond = {name: tensor.repeat(4, 1, 1) for name, tensor in one.cond.items()}
    latent_params = torch.arange(8 * 4 * 8 * 8).view(8, 4, 8, 8).to(torch.uint8)
    weight = torch.arange(1.0, 9.0)
    return Batch(
        latent_params=latent_params,
        cond=cond,
        keys=torch.arange(8),
        time_ids=torch.zeros(8, 6),
        ids=tuple("abcdefgh"),
        weight=weight,
    )


def gradients(trainer: Trainer, batch: Batch) -> list[Tensor]:
    """Of the third step, after two others."""
    for _ in range(2):
        trainer.step(batch)
    kept: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: kept.extend(p.grad.clone() for p in trainer.parameters.values() if p.grad is not None)
    )
    trainer.step(batch)
    return kept


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("room", "oom_micro_batch_size"), [(5, 4), (1, 1)])
def test_the_step_is_begun_anew_in_smaller_parts_to_the_same_gradient(
    precision: torch.dtype | None, room: int, oom_micro_batch_size: int
) -> None:
    plain = small_trainer("lora", precision=precision, max_grad_norm=0)
    scarce = small_trainer("lora", objective=Scarce, precision=precision, max_grad_norm=0)
    scarce.objective.room = room
    expected, found = gradients(plain, eight()), gradients(scarce, eight())
    assert (plain.oom_micro_batch_size, scarce.oom_micro_batch_size, scarce.micro_batch_size) == (
        None,
        oom_micro_batch_size,
        oom_micro_batch_size,
    )
    close = {"rtol": 1e-5, "atol": 1e-7} if precision is None else {"rtol": 0.1, "atol": 1e-3}
    torch.testing.assert_close(found, expected, **close)
    assert scarce.steps_done == 3
    passes = scarce.objective.passes
    scarce.step(eight())
    assert scarce.objective.passes == passes + 8 // oom_micro_batch_size  # without trying what is known not to fit


def test_memory_of_a_cpu_that_does_not_suffice_is_understood_and_another_error_is_not() -> None:
    scarce = small_trainer("lora", objective=Scarce)
    scarce.objective.room, scarce.objective.on_cpu = 4, True
    for _ in range(3):
        scarce.step(eight())
    assert scarce.oom_micro_batch_size == 4
    scarce.objective.room, scarce.objective.passes = 0, 3
    with pytest.raises(torch.OutOfMemoryError, match="step 4, one example at a time"):
        scarce.step(eight())
    wrong = small_trainer("lora")
    with pytest.raises(RuntimeError, match=r"expected input.* to have 4 channels"):
        wrong.step(replace(eight(), latent_params=torch.zeros(8, 5, 7, 7, dtype=torch.uint8)))


def test_what_was_found_to_fit_is_kept_in_the_state() -> None:
    scarce = small_trainer("lora", objective=Scarce)
    scarce.objective.room = 4
    for _ in range(3):
        scarce.step(eight())
    other = small_trainer("lora", objective=Scarce)
    other.load_state_dict(scarce.state_dict())
    assert (other.oom_micro_batch_size, other.micro_batch_size) == (4, 4)
    assert small_trainer("lora").state_dict()["fits"] is None


def test_memory_for_not_even_one_is_an_error_and_changes_nothing() -> None:
    scarce = small_trainer("full", objective=Scarce)
    scarce.objective.room, scarce.objective.passes = 0, 3
    before = [p.detach().clone() for p in scarce.parameters.values()]
    with pytest.raises(torch.OutOfMemoryError, match="step 1, one example at a time"):
        scarce.step(eight())
    assert all(map(torch.equal, before, scarce.parameters.values()))


def step_of_two(room: int) -> tuple[int | None, list[float]]:
    parallel = from_environment()
    trainer = small_trainer("lora", objective=Scarce, parallel=parallel)
    trainer.objective.room = room if parallel.rank == 1 else 8
    (own,) = list(eight().split(4))[parallel.rank : parallel.rank + 1]
    own = replace(own, global_step=GlobalStep(eight().ids, float(eight().weight.sum()), 4 * parallel.rank))
    return trainer.oom_micro_batch_size, [trainer.step(own).loss for _ in range(4)] + [
        float(trainer.oom_micro_batch_size or 0)
    ]


def test_all_processes_take_the_same_smaller_parts() -> None:
    first, second = together(step_of_two, 3)
    assert first == second
    assert first[1][-1] == 2
    alone = small_trainer("lora")
    assert first[1][:-1] == pytest.approx([alone.step(eight()).loss for _ in range(4)], rel=1e-5)

"""Steps that are not finite: gated, counted, forgiven up to a number."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finetune.batch import Batch
from finetune.training.metrics import NotFinite
from finetune.training.nonfinite import FiniteGate
from finetune.training.trainer import Trainer
from tests.small_trainer import small_batch, small_trainer


def spoilt() -> Batch:
    """The second of two pictures has no finite loss."""
    latent_params = small_batch().latent_params.float()
    latent_params[1] = float("nan")
    return replace(small_batch(), latent_params=latent_params)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters.values()])


def test_the_gate_shuts_for_a_bad_step_and_for_all_after_too_many() -> None:
    gate, nan, one = FiniteGate(2, torch.device("cpu")), torch.tensor(math.nan), torch.ones(())
    assert [float(gate.shut(loss, one)) for loss in (one, nan, one, nan, nan, one)] == [0, 1, 0, 1, 1, 1]
    gate.open()
    assert [float(gate.shut(one, norm)) for norm in (one, one / 0, one)] == [0, 1, 0]
    gate.open(1)
    assert [float(gate.shut(loss, one)) for loss in (nan, one)] == [1, 1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "adamw8bit"])
def test_as_many_as_allowed_leave_the_weights_and_the_run_goes_on(optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    trainer, good = small_trainer("lora", optimizer, max_bad_steps=3), small_batch()
    trainer.step(good).as_dict()
    before = weights(trainer)
    metrics = [trainer.step(spoilt()), trainer.step(spoilt())]
    assert [one.as_dict()["loss"] for one in metrics] == [None, None]
    assert torch.equal(weights(trainer), before)
    fault = metrics[1].fault
    assert fault is not None
    assert str(fault) == "step 3: the loss is not finite for b"
    assert (fault.step, fault.ids) == (3, ("a", "b"))
    assert math.isfinite(fault.losses[0])
    assert math.isnan(fault.losses[1])
    assert math.isnan(fault.loss)
    assert trainer.state_dict()["bad_steps"] == 2
    assert trainer.step(good).fault is None  # which begins to count anew
    assert not torch.equal(weights(trainer), before)
    assert trainer.state_dict()["bad_steps"] == 0
    before = weights(trainer)
    for _ in range(2):
        trainer.step(spoilt())
    with pytest.raises(NotFinite, match=r"step 7: .* for b; no weight was changed after 3 bad steps in a row"):
        trainer.step(spoilt()).as_dict()
    assert torch.equal(weights(trainer), before)


def test_a_resumed_trainer_goes_on_counting() -> None:
    trainer, other = (small_trainer("lora", max_bad_steps=2) for _ in range(2))
    trainer.step(spoilt())
    other.load_state_dict(trainer.state_dict())
    before = weights(other)
    with pytest.raises(NotFinite, match="step 2"):
        other.step(spoilt()).as_dict()
    other.load_state_dict(trainer.state_dict())
    assert other.step(small_batch()).fault is None
    assert not torch.equal(weights(other), before)


def test_fp16_tells_what_is_not_finite_from_an_overflow() -> None:
    trainer = small_trainer("full", "sgd", precision=torch.float16, max_bad_steps=2)
    before = weights(trainer)
    assert trainer.step(spoilt()).fault is not None
    assert trainer.overflows == 0
    assert torch.equal(weights(trainer), before)
    with pytest.raises(NotFinite):
        trainer.step(spoilt())

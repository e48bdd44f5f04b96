"""Prior prediction: class pictures teach what the untrained model answered."""

from dataclasses import replace

import pytest
import torch

from finetune.batch import Batch
from finetune.training.prior_prediction import untrained
from finetune.training.trainer import Trainer
from tests.small_trainer import small_batch, small_trainer


def watching(method: str) -> Trainer:
    trainer = small_trainer(method)
    trainer.prior = untrained(trainer.unet, None, adapter=method == "lora")
    return trainer


def batch(*is_class_image: bool) -> Batch:
    return replace(small_batch(), is_class_image=is_class_image)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_before_anything_is_learned_class_pictures_teach_nothing(method: str) -> None:
    trainer = watching(method)
    metrics = trainer.step(batch(True, True))
    assert metrics.loss < 1e-12
    assert metrics.grad_norm is not None
    assert metrics.grad_norm < 1e-6


@pytest.mark.parametrize("method", ["lora", "full"])
def test_others_teach_as_they_do_without(method: str) -> None:
    plain, watched = small_trainer(method), watching(method)
    assert watched.step(batch(False, False)).loss == plain.step(small_batch()).loss
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, watched.parameters[name])
    first = small_trainer(method).step(next(small_batch().split(1))).loss
    assert watching(method).step(batch(False, True)).loss == pytest.approx(first / 2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_it_answers_stays_as_training_goes_on(method: str) -> None:
    trainer = watching(method)
    assert trainer.prior is not None
    part = trainer.prepare(batch(True, True)).parts[0]
    before = trainer.prior(part.drawn.x_t, part.drawn.t, part.cond)
    for _ in range(3):
        trainer.step(batch(False, False))
    assert torch.equal(trainer.prior(part.drawn.x_t, part.drawn.t, part.cond), before)
    assert all(parameter.requires_grad for parameter in trainer.parameters.values())
    assert trainer.step(batch(True, True)).loss > 1e-9  # the adapter is on again, and leads away from it


def test_the_gradient_is_the_same_in_smaller_parts() -> None:
    found = []
    for size in (2, 1):
        trainer = watching("lora")
        trainer.step(batch(False, False))
        trainer.micro_batch_size = size
        trainer.backward(trainer.prepare(batch(False, True)))
        found.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None]))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-8)


def test_parts_that_are_cut_keep_which_they_are() -> None:
    trainer = watching("lora")
    whole = trainer.prepare(batch(False, True)).parts[0]
    assert whole.prior is not None
    assert whole.prior.tolist() == [1]
    first, second = whole.split(1)
    assert first.prior is None
    assert second.prior is not None
    assert second.prior.tolist() == [0]

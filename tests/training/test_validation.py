"""The loss on what is held out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.data.buckets import Buckets
from finetune.data.image_folder import ImageFolder
from finetune.models.loading import DiffusionModel, load_model
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.validation import (
    BANDS,
    band,
    chance_of_rise,
    paired,
    student_t,
    student_t_tail,
    validation_losses,
)


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def encoded(pictures: Path, tiny: DiffusionModel) -> EncodedDataset:
    images = ImageFolder(pictures, resolution=64, random_flip=True, buckets=Buckets(64, 32, 128, 8))
    return encode(images, tiny, cache_dir="none")


class Silent(nn.Module):
    """Answers 0, so that the loss is the mean square of the noise; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[int] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        assert not self.training
        self.asked += t.tolist()
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_each_slice_of_the_schedule_has_a_timestep_that_stays(tiny: DiffusionModel, encoded: EncodedDataset) -> None:
    objective, seen = NoisePrediction(tiny.scheduler), []
    for _ in range(2):
        unet = Silent().train()
        losses = validation_losses(unet, tiny.encoder, objective, encoded, [1, 4], draws=6, batch_size=1)
        assert unet.training
        assert sorted(t // 167 for t in unet.asked) == sorted(2 * list(range(6)))
        assert losses.mean().item() == pytest.approx(1, abs=0.05)
        seen.append((losses, unet.asked))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


def test_what_is_measured_depends_on_the_example_alone(tiny: DiffusionModel, encoded: EncodedDataset) -> None:
    objective, more = NoisePrediction(tiny.scheduler), {"draws": 3, "seed": 5}
    some = validation_losses(tiny.unet, tiny.encoder, objective, encoded, [4, 1], batch_size=1, **more)
    every = validation_losses(tiny.unet, tiny.encoder, objective, encoded, range(6), batch_size=4, **more)
    torch.testing.assert_close(every[[4, 1]], some, rtol=1e-4, atol=1e-5)
    assert len(every.unique()) == 18


def test_the_paired_difference_and_its_interval() -> None:
    before = torch.tensor([[1.0, 3.0], [5.0, 5.0], [9.0, 1.0]])
    after = before - torch.tensor([[1.0, 1.0], [1.0, 3.0], [4.0, 2.0]])  # means 1, 2, 3: spread 1
    mean, low, high = paired(before, after)
    assert mean == -2
    assert (low, high) == (pytest.approx(-2 - 4.3027 / 3**0.5, abs=1e-4), pytest.approx(-2 + 4.3027 / 3**0.5, abs=1e-4))
    with pytest.raises(ValueError, match="1 examples"):
        paired(before[:1], after[:1])


@pytest.mark.parametrize(("freedom", "reach"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t(freedom: int, reach: float) -> None:
    assert student_t(freedom) == pytest.approx(reach, abs=1e-3)


def test_the_interval_holds_what_it_says() -> None:
    """Of many normal samples of five, 95 % of the intervals hold the truth."""
    drawn = torch.randn(4000, 5, 1, generator=torch.Generator().manual_seed(0)) + 0.3
    zeros = torch.zeros(5, 1)
    held = sum(low < 0.3 < high for _, low, high in (paired(zeros, sample) for sample in drawn))
    assert 0.94 < held / 4000 < 0.96


def test_bands_are_thirds_of_the_noise() -> None:
    assert [band(torch.arange(6).view(1, 6), name).tolist() for name in BANDS] == [[[0, 1]], [[2, 3]], [[4, 5]]]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 199])
def test_the_tail_of_students_t_is_that_of_its_table(freedom: int) -> None:
    assert student_t_tail(student_t(freedom), freedom) == pytest.approx(0.025, abs=1e-4)
    assert student_t_tail(0.0, freedom) == pytest.approx(0.5)


def test_the_chance_of_a_rise_is_small_for_a_sure_one_and_large_for_none() -> None:
    before = torch.tensor([[1.0], [2.0], [3.0]])
    risen = before + torch.tensor([[1.0], [2.0], [3.0]])  # t is 2 / (1 / sqrt(3)), with 2 degrees of freedom
    assert chance_of_rise(before, risen) == pytest.approx(0.0371, abs=1e-4)
    assert chance_of_rise(risen, before) == 1.0
    assert chance_of_rise(before, before + 1) == 0.0


def test_fewer_examples_go_together_where_memory_does_not_suffice(
    tiny: DiffusionModel, encoded: EncodedDataset
) -> None:
    class Scarce(Silent):
        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
            if len(x) > 1:
                raise torch.OutOfMemoryError("not enough")
            return super().forward(x, t, **cond)

    objective, examples = NoisePrediction(tiny.scheduler), range(len(encoded))
    short, plain = (
        validation_losses(unet, tiny.encoder, objective, encoded, examples, draws=3, batch_size=size)
        for unet, size in ((Scarce(), 4), (Silent(), 1))
    )
    assert torch.equal(short, plain)

"""Batches of pictures of several shapes."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.batch import Batch
from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.data.buckets import Buckets
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches, training_steps
from finetune.errors import UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import add_lora, trainable
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.trainer import Trainer

FACTOR = 4
"""Of tiny's VAE."""


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


@pytest.fixture(scope="module")
def mixed(pictures: Path, tiny: DiffusionModel) -> EncodedDataset:
    images = ImageFolder(pictures, resolution=64, random_flip=True, buckets=Buckets(64, 32, 128, 8))
    return encode(images, tiny, cache_dir="none")


def test_a_step_is_a_batch_for_each_shape(mixed: EncodedDataset) -> None:
    seen: list[str] = []
    for parts in training_steps(mixed, batch_size=4, steps=3):
        assert sum(map(len, parts)) == 4
        shapes = [tuple(part.latent_params.shape[1:]) for part in parts]
        assert len(shapes) == len(set(shapes))
        assert all(
            [FACTOR * side for side in part.latent_params.shape[2:]] == size
            for part in parts
            for size in part.time_ids[:, 4:].tolist()
        )
        seen += [name for part in parts for name in part.ids]
    assert sorted(seen) == sorted(2 * list(mixed.ids))


def test_batches_of_several_shapes_are_told_where_one_is_wanted(mixed: EncodedDataset) -> None:
    with pytest.raises(UsageError, match="of several shapes; use training_steps"):
        next(batches(mixed, batch_size=4, steps=1))


@pytest.mark.parametrize("live", [False, True])
def test_buckets_and_flips_are_the_same_with_any_number_of_workers(
    pictures: Path, tiny: DiffusionModel, live: bool
) -> None:
    buckets = Buckets(64, 32, 128, 8)
    images = ImageFolder(pictures, resolution=64, random_flip=True, center_crop=False, buckets=buckets)
    encoded = encode(images, tiny, live=live, cache_dir="none")
    runs = [
        [part for parts in training_steps(encoded, batch_size=4, steps=3, num_workers=workers) for part in parts]
        for workers in (0, 1, 2)
    ]
    for same in zip(*runs, strict=True):
        for other in same[1:]:
            assert same[0].ids == other.ids
            assert torch.equal(same[0].latent_params, other.latent_params)
            assert torch.equal(same[0].time_ids, other.time_ids)


def test_each_picture_has_the_same_weight_whatever_its_shape(mixed: EncodedDataset, tiny: DiffusionModel) -> None:
    """Law 3: the gradient of a mixed step is the mean of the gradients of its pictures."""
    (parts,) = training_steps(mixed, batch_size=6, steps=1)
    assert len(parts) == 3

    def gradient(*batches: Batch, micro_batch_size: int | None = None) -> list[torch.Tensor]:
        model = load_model("tiny")
        add_lora(model.unet, rank=2)
        parameters = trainable(model.unet)
        trainer = Trainer(
            model.unet,
            model.encoder,
            NoisePrediction(model.scheduler),
            torch.optim.SGD(parameters),
            micro_batch_size=micro_batch_size,
        )
        trainer.backward(trainer.prepare(*batches))
        return [p.grad for p in parameters if p.grad is not None]

    singles = [gradient(single) for part in parts for single in part.split(1)]
    mean = [sum(grads) / 6 for grads in zip(*singles, strict=True)]
    for together in (gradient(*parts), gradient(*parts, micro_batch_size=1)):
        for ours, expected in zip(together, mean, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


class _Breaking:
    """Visits whose worker is killed while it sends: the connection breaks, and a moment later the signal comes."""

    needs_workers = True

    def load(self, index: int, key: int) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise ConnectionResetError(104, "Connection reset by peer")


def test_of_a_worker_that_is_killed_while_it_sends_torch_tells(mixed: EncodedDataset) -> None:
    def died(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    broken = replace(mixed, visits=_Breaking())  # pyright: ignore[reportArgumentType]
    before = signal.signal(signal.SIGALRM, died)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            next(training_steps(broken, batch_size=2, steps=2))
    finally:
        signal.signal(signal.SIGALRM, before)

"""What is stored for an inpainting model of pictures, and comes to its UNet beside x_t."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from finetune import seeding
from finetune.batch import Batch
from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset, as_batch
from finetune.cache.image_source import CachedImages
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches, training_steps
from finetune.data.transforms import normalize
from finetune.errors import DataError
from finetune.models.inpainting import MASKS, drawn_mask, mask_number
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.tiny import tiny_folder
from finetune.training.noise_prediction import NoisePrediction
from tests.tiny_inpainting import make_inpainting

BOX = (8, 16, 40, 44)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(make_inpainting(tiny_folder(), tmp_path_factory.mktemp("model") / "inpainting"))


@pytest.fixture
def folder(tmp_path: Path, make_pictures: Callable[..., Path]) -> Path:
    """Six pictures, the first two of them with a mask."""
    place = make_pictures(tmp_path / "pictures")
    for name in ("00", "01"):
        with Image.open(place / f"{name}.png") as picture:
            mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rectangle(BOX, fill="white")
        mask.save(place / f"{name}.mask.png")
    return place


def new(encoded: EncodedDataset) -> int:
    """Pictures that were encoded just now."""
    return next(made.new for made in encoded.made if made.kind == "picture")


def of_pipeline(model: DiffusionModel, picture: Image.Image, mask: Image.Image, key: int) -> torch.Tensor:
    """The five channels as diffusers' own pipeline makes them of a picture and its mask."""
    pipeline: Any = model.pipeline()
    height, width = picture.height, picture.width
    image = pipeline.image_processor.preprocess(picture, height=height, width=width)
    white = pipeline.mask_processor.preprocess(mask, height=height, width=width)
    resized = pipeline.vae.encode(image * (white < 0.5)).latent_dist
    eps = seeding.normal(torch.tensor([key]), "sample of what is shown", resized.mean.shape[1:])
    latents = (resized.mean + resized.std * eps) * pipeline.vae.config.scaling_factor
    small, shown = pipeline.prepare_mask_latents(
        white, latents, 1, height, width, torch.float32, latents.device, None, False
    )
    return torch.cat([small, shown], dim=1)


def one(encoded: EncodedDataset, index: int, key: int) -> Batch:
    return encoded.collate([index], torch.tensor([key]), [encoded.visits.load(index, key)])


@pytest.mark.parametrize("live", [False, True])
@torch.no_grad()
def test_the_unet_is_shown_what_the_pipeline_shows_it(folder: Path, model: DiffusionModel, live: bool) -> None:
    pictures = ImageFolder(folder, "a disc", resolution=64)
    encoded = encode(pictures, model, live=live, cache_dir="none")
    for index, key in ((0, 3), (5, 3), (5, 4)):
        batch = one(encoded, index, key)
        image = pictures[index].image
        crop = pictures.sample(index).crop(key)
        as_trained = Image.fromarray(crop.pixels(image).permute(1, 2, 0).numpy())
        if (mask := pictures.companion(index, "mask")) is not None:
            drawn = Image.fromarray(crop.pixels(mask)[0].numpy())
        else:
            source = key if live else seeding.example_key(0, pictures.ids[index], mask_number(key))
            drawn = Image.fromarray(drawn_mask(source, 64, 64)[0].numpy())
        expected = of_pipeline(model, as_trained, drawn, key)
        assert batch.unet_channels is not None
        assert torch.equal(batch.unet_channels[:, :1], expected[:, :1])
        assert (batch.unet_channels - expected).abs().max() < 1e-4  # pixels are scaled in another order of operations
        assert batch.mask is None  # errors count everywhere
        plain = model.encoder.encode(normalize(crop.pixels(image))[None])
        assert (batch.latent_params - plain).abs().max() < 1e-5


@torch.no_grad()
def test_the_extra_channels_reach_the_unet_and_count(folder: Path, model: DiffusionModel) -> None:
    encoded = encode(ImageFolder(folder, "a disc", resolution=64), model, cache_dir="none")
    (batch,) = batches(encoded, batch_size=6, steps=1)
    objective = NoisePrediction(model.scheduler)
    noised = objective.sample(model.encoder.sample(batch.latent_params, batch.keys), batch.keys)
    loss = objective.loss(model.unet, noised, batch.cond, batch.unet_channels)
    assert batch.unet_channels is not None
    other = objective.loss(model.unet, noised, batch.cond, torch.zeros_like(batch.unet_channels))
    assert loss.shape == (6,)
    assert not loss.isclose(other).any()


def test_each_picture_is_encoded_whole_and_once_with_each_of_its_masks(folder: Path, model: DiffusionModel) -> None:
    cache = folder.parent / "cache"
    flipped = encode(ImageFolder(folder, "a disc", resolution=64, random_flip=True), model, cache_dir=cache)
    assert new(flipped) == 2 * (2 * (1 + 1) + 4 * (1 + MASKS))
    assert new(encode(ImageFolder(folder, "a disc", resolution=64, random_flip=True), model, cache_dir=cache)) == 0
    plain = load_model("tiny")
    assert new(encode(ImageFolder(folder, "a disc", resolution=64), plain, cache_dir=cache)) == 0  # their own encodings
    keys = {mask_number(key): key for key in range(200)}
    kept = flipped.visits
    assert isinstance(kept, CachedImages)
    loaded = {number: flipped.visits.load(4, key).condition["mask"] for number, key in keys.items()}
    assert len({tensor.numpy().tobytes() for tensor in loaded.values()}) >= MASKS - 3  # some cover everything


def test_another_mask_is_encoded_anew_and_one_that_changes_meanwhile_is_refused(
    folder: Path, model: DiffusionModel
) -> None:
    cache = folder.parent / "cache"
    encode(ImageFolder(folder, "a disc", resolution=64), model, cache_dir=cache)
    mask = folder / "01.mask.png"
    with Image.open(mask) as before:
        Image.new("L", before.size, "white").save(mask)
    changed = encode(ImageFolder(folder, "a disc", resolution=64), model, cache_dir=cache)
    assert new(changed) == 1
    unet_channels = one(changed, 1, 0).unet_channels
    assert unet_channels is not None
    assert unet_channels[:, 0].all()
    late = ImageFolder(folder, "a disc", resolution=64)
    ImageDraw.Draw(white := Image.open(mask)).rectangle(BOX, fill="black")
    white.save(mask)
    with pytest.raises(DataError, match=r"01\.mask\.png: the file has changed since the start"):
        encode(late, model, cache_dir="none")


def test_only_the_masks_that_visits_come_to_are_encoded(folder: Path, model: DiffusionModel) -> None:
    pictures = ImageFolder(folder, "a disc", resolution=64)
    visits = [(5, 3), (5, 4), (2, 3), (5, 3)]
    numbers = {mask_number(3), mask_number(4)}
    encoded = encode(pictures, model, cache_dir="none", visited=visits)
    assert new(encoded) == 2 + len(numbers) + 1
    ahead = encode(pictures, model, cache_dir="none", visited=visits, time_budget=0)
    assert new(ahead) == 0
    ahead.ensure_encoded(visits[:1])
    assert torch.equal(ahead.visits.load(5, 3)[0], encoded.visits.load(5, 3)[0])
    assert ahead.live
    ahead.ensure_encoded(visits)
    assert not ahead.live


def test_steps_with_encodings_made_on_demand_are_the_same(folder: Path, model: DiffusionModel) -> None:
    pictures = ImageFolder(folder, "a disc", resolution=64, random_flip=True)
    before, ahead = (encode(pictures, model, cache_dir="none", time_budget=limit) for limit in (None, 0))
    some, others = (list(training_steps(each, batch_size=4, steps=4)) for each in (before, ahead))
    for (a,), (b,) in zip(some, others, strict=True):
        assert torch.equal(a.latent_params, b.latent_params)
        assert a.unet_channels is not None
        assert b.unet_channels is not None
        assert torch.equal(a.unet_channels, b.unet_channels)


@torch.no_grad()
def test_a_loader_of_ones_own_may_bring_masks_or_not(model: DiffusionModel) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn = as_batch(model, pixels, ["a", "b"], step=1)
    masks = torch.stack([drawn_mask(key, 64, 64) for key in drawn.keys.tolist()])
    given = as_batch(model, pixels, ["a", "b"], step=1, masks=masks)
    none = as_batch(model, pixels, ["a", "b"], step=1, masks=torch.zeros(2, 1, 64, 64))
    assert drawn.unet_channels is not None
    assert given.unet_channels is not None
    assert none.unet_channels is not None
    assert torch.equal(drawn.unet_channels, given.unet_channels)
    assert not none.unet_channels[:, 0].any()
    sample = model.encoder.sample(none.latent_params, none.keys, "sample of what is shown")
    assert (none.unet_channels[:, 1:] - sample).abs().max() < 1e-5  # all of the picture is shown
    assert as_batch(load_model("tiny"), pixels, ["a", "b"], step=1).unet_channels is None

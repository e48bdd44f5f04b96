import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import as_batch
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.data.transforms import Preprocess, normalize
from finetune.errors import DataError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import add_lora, trainable
from finetune.seeding import example_key
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.trainer import Trainer


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


def five_losses(pictures: Path, live: bool, flip: bool = True) -> list[float]:
    model = load_model("tiny")
    add_lora(model.unet, rank=4)
    images = ImageFolder(pictures, resolution=64, random_flip=flip)
    encoded = encode(images, model, live=live, captioning=CaptionAugmentation(dropout=0.3))
    optimizer = torch.optim.AdamW(trainable(model.unet), lr=1e-3)
    trainer = Trainer(model.unet, model.encoder, NoisePrediction(model.scheduler), optimizer)
    return [trainer.step(batch).loss for batch in batches(encoded, batch_size=4, steps=5)]


def test_kept_and_live_encoding_give_the_same_losses(pictures: Path) -> None:
    assert five_losses(pictures, live=False) == pytest.approx(five_losses(pictures, live=True), rel=1e-5)


def test_what_is_stored_is_the_posterior_and_flips_keep_two(pictures: Path, tiny: DiffusionModel) -> None:
    images = ImageFolder(pictures, resolution=64, random_flip=True)
    encoded = encode(images, tiny)
    pixels, _ = Preprocess(64)(images[0].image, 0)
    for version, shown in ((0, pixels), (1, pixels.flip(-1))):
        posterior = tiny.encoder.vae.encode(normalize(shown[None])).latent_dist
        expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
        (item,) = encoded.visits.store.load([list(encoded.visits.keys(0, None))[version]])
        assert torch.equal(item["stored"], expected)


def test_latents_are_scaled_by_the_configs_factor_and_sampled_anew_at_each_visit(
    pictures: Path, tiny: DiffusionModel
) -> None:
    encoded = encode(ImageFolder(pictures, resolution=64), tiny)
    first, second = batches(encoded, batch_size=6, steps=2)
    mean, std = first.latent_params.chunk(2, dim=1)
    noise = (tiny.encoder.sample(first.latent_params, first.keys) / tiny.encoder.scaling_factor - mean) / std
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    row = second.ids.index(first.ids[0])
    assert first.keys[0] != second.keys[row]


def test_worker_count_changes_nothing_to_the_bit(pictures: Path, tiny: DiffusionModel) -> None:
    images = ImageFolder(pictures, resolution=64, random_flip=True, center_crop=False)
    for live in (False, True):
        encoded = encode(images, tiny, live=live, captioning=CaptionAugmentation(dropout=0.5))
        runs = [list(batches(encoded, batch_size=4, steps=4, num_workers=workers)) for workers in (0, 2)]
        for a, b in zip(*runs, strict=True):
            assert a.ids == b.ids
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.latent_params, b.latent_params)
            assert torch.equal(a.time_ids, b.time_ids)
            assert torch.equal(a.cond["encoder_hidden_states"], b.cond["encoder_hidden_states"])


def test_workers_are_started_only_where_there_is_something_to_prepare(pictures: Path, tiny: DiffusionModel) -> None:
    images = ImageFolder(pictures, resolution=64)
    for live, workers in ((False, 0), (True, 2)):
        steps = batches(encode(images, tiny, live=live), batch_size=2, steps=8, num_workers=2)
        next(steps)
        assert len(multiprocessing.active_children()) == workers
        del steps


@pytest.fixture
def spawning() -> Iterator[None]:
    """New processes start from nothing, as on macOS."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawning")
def test_workers_that_are_spawned_get_no_tensors_and_change_nothing(pictures: Path, tiny: DiffusionModel) -> None:
    encoded = encode(ImageFolder(pictures, resolution=64), tiny, live=True)
    sent = pickle.dumps(encoded.visits)
    assert len(sent) < 10_000  # paths and captions
    (alone,), (spawned,) = (list(batches(encoded, batch_size=4, steps=1, num_workers=n)) for n in (0, 1))
    assert torch.equal(alone.latent_params, spawned.latent_params)


def test_each_picture_gets_its_own_caption_and_dropped_ones_the_empty_prompt(
    pictures: Path, tiny: DiffusionModel
) -> None:
    images = ImageFolder(pictures, resolution=64)
    states = {c: tiny.conditioner.encode([c])["encoder_hidden_states"][0] for c in [*images.captions, ""]}
    own = dict(zip(images.ids, images.captions, strict=True))
    dropped = 0
    for batch in batches(encode(images, tiny, captioning=CaptionAugmentation(dropout=0.5)), batch_size=6, steps=8):
        for name, row in zip(batch.ids, batch.cond["encoder_hidden_states"], strict=True):
            empty = torch.equal(row, states[""])
            assert empty or torch.equal(row, states[own[name]])
            dropped += empty
    assert 12 <= dropped <= 36  # 48 visits, half dropped


def test_a_random_crop_is_drawn_once_when_kept_and_at_each_visit_when_live(
    pictures: Path, tiny: DiffusionModel
) -> None:
    images = ImageFolder(pictures, resolution=64, center_crop=False)
    for live in (False, True):
        seen: dict[str, set[tuple[int, ...]]] = {}
        for batch in batches(encode(images, tiny, live=live), batch_size=6, steps=5):
            for name, row in zip(batch.ids, batch.time_ids.tolist(), strict=True):
                seen.setdefault(name, set()).add(tuple(row))
        wide = seen["00.png"]  # 80 x 64: the crop can move
        assert len(wide) > 1 if live else len(wide) == 1


def test_a_mirrored_picture_has_the_mirrored_corner(pictures: Path, tiny: DiffusionModel) -> None:
    images = ImageFolder(pictures, resolution=64, center_crop=False, random_flip=True)
    place = images.ids.index("00.png")  # 80 x 64: the crop can move
    key = example_key(0, "00.png", 0)
    plain, mirrored = (
        Preprocess(64, center_crop=False)(images[place].image, key, flip)[1].tolist() for flip in (False, True)
    )
    assert plain[3] + mirrored[3] == 80 - 64
    seen: dict[bool, list[int]] = {}
    encoded = encode(images, tiny)
    for batch in batches(encoded, batch_size=6, steps=20):
        row = batch.ids.index("00.png")
        (mirror,) = encoded.visits.store.load([list(encoded.visits.keys(place, None))[1]])
        flipped = torch.equal(batch.latent_params[row], mirror["stored"])
        seen[flipped] = batch.time_ids[row].tolist()
    assert seen == {False: plain, True: mirrored}


class Squares(Dataset):
    """A dataset as a user would write it."""

    def __init__(self, size: Callable[[int], int] = lambda index: 64, name: str = "square {}"):
        self.size, self.name = size, name

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        side = self.size(index)
        return Image.new("RGB", (side, side), (80 * index, 0, 0)), f"a square {index}", self.name.format(index)


def test_a_dataset_of_ones_own_is_encoded_as_it_is(tiny: DiffusionModel) -> None:
    batch = next(batches(encode(Squares(), tiny), batch_size=3, steps=1))
    assert sorted(batch.ids) == ["square 0", "square 1", "square 2"]
    assert batch.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 3


def test_transparent_and_grey_pictures_of_ones_own_become_rgb_over_white(tiny: DiffusionModel) -> None:
    class Modes(Squares):
        def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
            return Image.new(("RGBA", "L", "RGB")[index], (64, 64), (0, 255, (255, 255, 255))[index]), "x", str(index)

    encoded = encode(Modes(), tiny)
    transparent, grey, white = (encoded.visits.load(index, key=0)[0] for index in range(3))
    assert torch.equal(transparent, white)
    assert torch.equal(grey, white)


def test_another_background_is_another_encoding(tiny: DiffusionModel, tmp_path: Path) -> None:
    for color in ("black", "white"):
        (tmp_path / color).mkdir()
        Image.new("RGB", (64, 64), color).save(tmp_path / color / "a.png")
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (64, 64)).save(tmp_path / "clear" / "a.png")

    def stored(folder: str, **options: str) -> torch.Tensor:
        images = ImageFolder(tmp_path / folder, "a thing", resolution=64, **options)
        encoded = encode(images, tiny, cache_dir=tmp_path / "cache")
        assert torch.equal(
            encoded.visits.preview_pixels(0, key=0), encode(images, tiny, live=True).visits.preview_pixels(0, key=0)
        )
        return encoded.visits.load(0, key=0)[0]

    assert torch.equal(stored("clear"), stored("white"))
    assert torch.equal(stored("clear", background="black"), stored("black"))
    assert not torch.equal(stored("clear"), stored("clear", background="black"))


def test_pictures_of_two_sizes_and_doubled_ids_are_refused(tiny: DiffusionModel) -> None:
    with pytest.raises(DataError, match="differ in size"):
        next(batches(encode(Squares(lambda index: 64 + 16 * index), tiny), batch_size=3, steps=1))
    with pytest.raises(DataError, match="two images have the id 'same'"):
        encode(Squares(name="same"), tiny)


def test_as_batch_encodes_what_a_plain_loader_gives(tiny: DiffusionModel) -> None:
    source = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64, generator=source) * 2 - 1
    batch = as_batch(tiny, pixels, ["a", "b"], step=3)
    assert torch.equal(batch.latent_params, tiny.encoder.encode(pixels))
    assert batch.cond["encoder_hidden_states"].shape == (2, 77, 96)
    assert not torch.equal(batch.keys, as_batch(tiny, pixels, ["a", "b"], step=4).keys)


def test_no_graph_reaches_the_frozen_parts(pictures: Path, tiny: DiffusionModel) -> None:
    batch = next(batches(encode(ImageFolder(pictures, resolution=64), tiny), batch_size=2, steps=1))
    x0 = tiny.encoder.sample(batch.latent_params, batch.keys)
    assert not x0.requires_grad
    assert not batch.cond["encoder_hidden_states"].requires_grad

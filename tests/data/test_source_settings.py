"""Sources that each have settings of their own, in one run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune.cache.encode import encode
from finetune.config import TrainConfig
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.concat import ConcatDataset, Source
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import training_steps
from finetune.data.source_settings import SourceSettings
from finetune.data.transforms import Preprocess
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.model_info import locate
from finetune.run.build_dataset import default_settings, settings_by_source


@pytest.fixture
def both(make_pictures: Callable[..., Path], tmp_path: Path) -> ConcatDataset:
    large = SourceSettings(name="large", transform=Preprocess(64, random_flip=True), prompt="a, b, c", loss_weight=0.5)
    small = SourceSettings(
        name="small",
        transform=Preprocess(32, background="black"),
        prompt="d",
        captioning={"dropout": 0.9},
    )
    folders = [make_pictures(tmp_path / settings.name, count=3) for settings in (large, small)]
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folders[1] / "00.png")
    return ConcatDataset(
        [
            Source(settings, ImageFolder(folder, settings.prompt, transform=settings.transform))
            for settings, folder in zip((large, small), folders, strict=True)
        ]
    )


@pytest.mark.parametrize("live", [False, True])
def test_each_picture_is_treated_as_its_source_says(both: ConcatDataset, live: bool) -> None:
    encoded = encode(
        both, load_model("tiny"), live=live, captioning=CaptionAugmentation(shuffle=True), cache_dir="none"
    )
    assert both.shapes() == [1, 1, 1, 0, 0, 0]
    captions, flips, dropped = set(), set(), 0
    for batches in training_steps(encoded, batch_size=6, steps=20):
        for batch in batches:
            (source,) = {name.split("/")[0] for name in batch.ids}
            side = {"large": 64, "small": 32}[source]
            assert batch.latent_params.shape[2:] == (side // 4, side // 4)
            assert batch.time_ids[:, 4:].unique().tolist() == [side]
            assert batch.weight.unique().tolist() == [{"large": 0.5, "small": 1.0}[source]]
            for name, key in zip(batch.ids, batch.keys.tolist(), strict=True):
                index = both.ids.index(name)
                caption, flip = encoded.caption(index, key), encoded.visits.load(index, key).flip
                if source == "large":
                    captions.add(caption)
                    flips.add(flip)
                else:
                    dropped += not caption
                    assert not flip
    assert len(captions) == 6  # all orders of three tags
    assert flips == {False, True}
    assert 45 < dropped < 60
    transparent = both.ids.index("small/00.png")
    assert encoded.visits.preview_pixels(transparent, 0).unique().tolist() == [0]


def test_settings_of_a_run_are_the_defaults_of_its_sources(tmp_path: Path) -> None:
    config = TrainConfig(
        data=(str(tmp_path / "cats"), str(tmp_path / "dogs")), repeats=(2, 1), prompt="a pet", trigger="zwx",
        resolution=64, random_flip=True, masked_loss=True,
    )  # fmt: skip
    defaults = default_settings(config, locate("tiny"))
    cats, dogs = settings_by_source(config, locate("tiny"), 2)
    assert (cats.name, cats.repeats, dogs.name, dogs.repeats) == ("cats", 2, "dogs", 1)
    assert {(each.prompt, each.trigger, each.masks) for each in (cats, dogs)} == {("a pet", "zwx", "files and alpha")}
    assert cats.transform == defaults.transform
    assert cats.transform is not None
    assert (cats.transform.resolution, cats.transform.random_flip) == (64, True)
    with pytest.raises(UsageError, match="repeats: 2 numbers for 1 --data"):
        settings_by_source(config, locate("tiny"), 1)


def test_a_transform_or_its_arguments(make_pictures: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "a", count=1)
    arguments = ImageFolder(folder, resolution=32, random_flip=True)
    assert ImageFolder(folder, transform=Preprocess(32, random_flip=True)).transform == arguments.transform
    assert ImageFolder(folder).transform == Preprocess(512)
    with pytest.raises(UsageError, match="resolution cannot be used with transform"):
        ImageFolder(folder, transform=Preprocess(32), resolution=64)
    sample = arguments.sample(0)
    assert torch.equal(sample.crop(0).pixels(sample.open()), Preprocess(32)(arguments[0].image, 0)[0])


def test_class_images_have_not_the_trigger_of_the_subject() -> None:
    texts = ("", "class_images = true", 'class_images = true, prompt = "a dog", trigger = "old"')
    config = TrainConfig(data=["a", "b", "c"], prompt="a photo of zwx dog", trigger="zwx", source_settings=texts)
    subject, bare, named = settings_by_source(config, locate("tiny"), 3)
    assert (subject.prompt, subject.trigger) == ("a photo of zwx dog", "zwx")
    assert (bare.prompt, bare.trigger) == ("a photo of zwx dog", None)
    assert (named.prompt, named.trigger) == ("a dog", "old")


def test_two_names_of_one_folder_are_each_used_as_given_and_said(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_pictures(tmp_path / "discs", count=3)
    (tmp_path / "link").symlink_to(folder)
    sources = [SourceSettings(name=name, prompt=prompt) for name, prompt in (("discs", "a disc"), ("link", "a ring"))]
    both = ConcatDataset(
        [Source(each, ImageFolder(tmp_path / each.name, each.prompt, resolution=32)) for each in sources]
    )
    assert both.captions == ["a disc"] * 3 + ["a ring"] * 3
    assert "link has the same images as discs; each is trained as its source says" in both.notes()

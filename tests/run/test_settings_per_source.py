"""Each source of images with settings of its own, from the command line, our dataset file and that of sd-scripts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.cli import parse_train
from finetune.commands.foreign.sd_scripts_dataset import take_dataset
from finetune.config import TrainConfig
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.sampler import Turns
from finetune.errors import UsageError
from finetune.models.model_info import locate
from finetune.run.build_dataset import digest, open_pictures
from finetune.source_options import parse_settings, settings_text


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three folders of two pictures each, captioned by files."""
    colours = {"dog": "red", "cat": "green", "thing": "blue"}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for number, side in enumerate((64, 80)):
            Image.new("RGB", (side, 64), colour).save(tmp_path / name / f"{number}.png")
        (tmp_path / name / "0.txt").write_text(f"{name}, {{tall|small}}, one, two")
    return tmp_path / "dog", tmp_path / "cat", tmp_path / "thing"


def opened(**options: Any) -> Any:
    return open_pictures(TrainConfig(validation_fraction=0.0, **options), locate("tiny"), None).first


def test_each_source_is_captioned_sized_flipped_and_weighted_by_its_own_settings(folders: tuple[Path, ...]) -> None:
    dog, cat, _ = map(str, folders)
    pictures = opened(
        data=(dog, cat), prompt="a photo", random_flip=True, repeats=(3, 1),
        source_settings=(
            'prompt = "zwx dog", shuffle_caption = true, keep_tokens = 1, random_flip = false',
            'resolution = 32, loss_weight = 0.25, caption_prefix = "best,", enable_wildcard = true',
        ),
    )  # fmt: skip
    assert pictures.ids == ["dog/0.png", "dog/1.png", "cat/0.png", "cat/1.png"]
    assert pictures.captions[1::2] == ["zwx dog", "a photo"]
    assert (pictures.sizes()[0], pictures.sizes()[2]) == ((64, 64), (32, 32))
    assert pictures.weights == [1.0, 1.0, 0.25, 0.25]
    assert pictures.repeats == [3, 3, 1, 1]
    run = CaptionAugmentation(dropout=0.5)
    first, second = pictures.captioning(0, run), pictures.captioning(2, run)
    assert first == CaptionAugmentation(dropout=0.5, shuffle=True, keep_tokens=1)
    assert second == CaptionAugmentation(dropout=0.5, prefix="best,", wildcards=True)
    assert pictures.flips


def test_class_images_of_several_sources_come_after_the_subject(folders: tuple[Path, ...]) -> None:
    dog, cat, thing = map(str, folders)
    pictures = opened(
        data=(cat, dog, thing), prompt="a photo", source_settings=("class_images = true", "", "class_images = true")
    )
    assert pictures.ids == ["dog/0.png", "dog/1.png", "cat/0.png", "cat/1.png", "thing/0.png", "thing/1.png"]
    assert pictures.num_subject_images == 2
    assert pictures.class_pictures == [2, 3, 4, 5]
    assert pictures.epoch_visits == 4
    with pytest.raises(UsageError, match=r"class_images = true \(dog\) with no source of the subject"):
        opened(data=(dog,), prompt="a", source_settings=("class_images = true",))
    with pytest.raises(UsageError, match=r"class_images = true \(cat\) with class_data"):
        opened(data=(dog, cat), prompt="a", source_settings=("", "class_images = true"), class_data=thing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("promt = 'x'",), "source_settings promt: not an option of a source; did you mean prompt?"),
        (("prompt",), "source_settings prompt: expected NAME = VALUE"),
        (("prompt = 'a'}\nrank = {b = 1",), "expected NAME = VALUE"),
        (("random_flip = 3",), "random_flip = 3: expected true or false"),
        (("loss_weight = 0",), "loss_weight = 0.0: expected above 0"),
        (("loss_weight = 'x'",), "source_settings loss_weight = 'x': expected a number"),
        (("resolution = 65",), "resolution = 65: tiny takes multiples of 8 pixels"),
        (("rank = 4",), "source_settings rank: not an option of a source"),
        (("", ""), "source_settings: 2 texts for 1 --data"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    folders: tuple[Path, ...], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        opened(data=(str(folders[0]),), prompt="a", source_settings=settings)


def test_settings_go_through_their_text_unchanged() -> None:
    settings = {"prompt": 'say "zwx" \\ ünïcode, {a|b} = 1', "resolution": 512, "random_flip": True, "loss_weight": 0.5}
    assert parse_settings(settings_text(settings)) == settings
    assert parse_settings("") == {}


def test_a_dataset_file_of_our_own(folders: tuple[Path, ...], tmp_path: Path) -> None:
    dog, cat, _ = folders
    file = tmp_path / "sources.toml"
    file.write_text(
        f"""
        resolution = 64
        [[source]]
        data = "{dog}"
        repeats = 10
        prompt = "zwx dog"
        [[source]]
        data = "{cat}"
        random_flip = true
        """
    )
    config = parse_train(["--data", str(file), "--rank", "2", "--prompt", "a cat"])
    assert (config.data, config.repeats, config.resolution) == ((str(dog), str(cat)), (10, 1), 64)
    assert config.source_settings == ('prompt = "zwx dog"', "random_flip = true")
    file.write_text("[[source]]\nrepeats = 2\n")
    with pytest.raises(UsageError, match="source 1 has no data"):
        parse_train(["--data", str(file)])
    file.write_text('[[source]]\ndata = "x"\npromt = "y"\n')
    with pytest.raises(UsageError, match="promt: not an option of a source"):
        parse_train(["--data", str(file)])


def test_subsets_of_sd_scripts_keep_what_they_have_otherwise() -> None:
    tables = {
        "general": {"caption_extension": ".txt", "enable_bucket": True, "shuffle_caption": True},
        "datasets": [
            {
                "resolution": 1024,
                "subsets": [
                    {"image_dir": "a", "num_repeats": 10, "class_tokens": "sks", "keep_tokens": 2},
                    {"image_dir": "b", "shuffle_caption": False, "flip_aug": True, "caption_prefix": "best"},
                ],
            },
            {
                "resolution": 768,
                "batch_size": 4,
                "subsets": [{"image_dir": "c", "keep_tokens": 2, "random_crop": True}],
            },
        ],
    }
    imported = take_dataset(tables)
    assert imported.ours["data"] == ("a", "b", "c")
    assert imported.ours["repeats"] == (10, 1, 1)
    assert (imported.ours["resolution"], imported.ours["keep_tokens"]) == (1024, 2)
    first, second, third = map(parse_settings, imported.ours["source_settings"])
    assert first == {"prompt": "sks"}
    assert second == {"shuffle_caption": False, "random_flip": True, "caption_prefix": "best", "keep_tokens": 0}
    assert third == {"resolution": 768, "center_crop": False}
    assert list(imported.skipped) == ["c.train_batch_size = 4"]


def test_several_folders_of_class_images_of_sd_scripts() -> None:
    subsets = [
        {"image_dir": "dog", "class_tokens": "sks dog"},
        {"image_dir": "dogs", "is_reg": True, "class_tokens": "dog"},
        {"image_dir": "people", "is_reg": True, "class_tokens": "person"},
    ]
    ours = take_dataset({"datasets": [{"subsets": subsets}]}).ours
    assert ours["data"] == ("dog", "dogs", "people")
    assert [parse_settings(text).get("class_images", False) for text in ours["source_settings"]] == [False, True, True]
    assert "class_data" not in ours


def test_a_run_trains_each_source_as_it_says_and_resumes(folders: tuple[Path, ...], tmp_path: Path) -> None:
    dog, cat, thing = map(str, folders)
    options: dict[str, Any] = {
        "data": (dog, cat, thing), "prompt": "a photo", "train_batch_size": 2, "max_train_steps": 6, "rank": 2,
        "num_inference_steps": 0, "validation_fraction": 0.0, "repeats": (2, 1, 1),
        "source_settings": (
            'shuffle_caption = true, prompt = "zwx"', "resolution = 32, loss_weight = 0.5", "class_images = true"
        ),
    }  # fmt: skip
    straight = ft.fine_tune(ft.TrainConfig(**options, output_dir=str(tmp_path / "straight")))
    with pytest.raises(ft.Interrupted):
        ft.fine_tune(ft.TrainConfig(**options, output_dir=str(tmp_path / "out"), max_train_minutes=1e-9))
    resumed = ft.fine_tune(ft.TrainConfig(**options, output_dir=str(tmp_path / "out")))
    lines = [(folder / "metrics.jsonl").read_text() for folder in (straight, resumed)]
    assert lines[0] == lines[1]
    losses = [json.loads(line)["loss"] for line in lines[0].splitlines() if "loss" in json.loads(line)]
    plain = ft.fine_tune(ft.TrainConfig(**options | {"source_settings": ()}, output_dir=str(tmp_path / "plain")))
    assert (plain / "metrics.jsonl").read_text() != lines[0]
    assert torch.tensor(losses).isfinite().all()


def test_a_number_of_samples_takes_the_place_of_repeats(folders: tuple[Path, ...]) -> None:
    dog, cat, thing = map(str, folders)
    own = ("", "samples = 1", "class_images = true")
    pictures = opened(data=(dog, cat, thing), prompt="a photo", source_settings=own)
    assert pictures.turns == [Turns([2, 3], 1), Turns([4, 5], 3)]
    assert pictures.epoch_visits == 6
    (alone,) = opened(data=(cat,), prompt="a photo", source_settings=("samples = 7",)).turns
    assert alone == Turns([0, 1], 7)
    for repeats, settings, other in (
        ((2,), "samples = 7", "repeats"),
        ((1,), own[2] + ", samples = 7", "class_images"),
    ):
        with pytest.raises(UsageError, match=rf"samples = 7 \(dog\) with {other}"):
            opened(data=(dog,), prompt="a", repeats=repeats, source_settings=(settings,))
    with pytest.raises(UsageError, match="samples = 0: expected above 0"):
        opened(data=(dog,), prompt="a", source_settings=("samples = 0",))
    assert digest(opened(data=(dog,), prompt="a", source_settings=("samples = 7",))) != digest(
        opened(data=(dog,), prompt="a", source_settings=("samples = 8",))
    )

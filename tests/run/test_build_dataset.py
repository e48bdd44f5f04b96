from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from PIL import Image

from finetune.config import TrainConfig
from finetune.data.datasets import HuggingFaceDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.user_dataset import UserDataset
from finetune.errors import DataError, UsageError
from finetune.models.model_info import locate
from finetune.run.build_dataset import digest, open_pictures


def test_other_pixels_under_the_same_names_are_other_pictures(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_pictures(tmp_path / "data", count=3)
    before = digest(ImageFolder(folder, prompt="a disc"))
    assert digest(ImageFolder(folder, prompt="a disc", resolution=64)) == before
    Image.new("RGB", (80, 64), "blue").save(folder / "00.png")
    after = ImageFolder(folder, prompt="a disc")
    assert digest(after) != before
    assert digest(UserDataset(after)) == digest(after)


def test_rows_that_were_filtered_are_other_pictures(pictures: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in sorted(pictures.glob("*.png"))]})
    first, last = (HuggingFaceDataset(rows.select(some), prompt="a disc") for some in ([0, 1], [4, 5]))
    assert (first.ids, first.captions) == (last.ids, last.captions)
    assert digest(first) != digest(last)


def test_a_dataset_of_ones_own_is_known_by_its_pixels() -> None:
    red, blue = (UserDataset([(Image.new("RGB", (8, 8), colour), "a", "1")]) for colour in ("red", "blue"))
    assert digest(red) != digest(blue)


def test_only_what_comes_as_a_stream_is_cut_short(pictures: Path) -> None:
    config = TrainConfig(data=str(pictures), stream_rows=3)
    with pytest.raises(UsageError, match=r"stream_rows is for datasets on the Hugging Face hub; .* on this machine"):
        open_pictures(config, locate("tiny"), None)


def test_a_table_of_ones_own_may_have_class_pictures(
    pictures: Path, make_pictures: Callable[..., Path], tmp_path: Path
):
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in sorted(pictures.glob("*.png"))]})
    kind = make_pictures(tmp_path / "kind", count=2, captions=True)
    config = TrainConfig(prompt="a disc", class_data=str(kind), validation_fraction=0.0)
    found = open_pictures(config, locate("tiny"), rows.cast_column("image", datasets.Image())).first
    assert (found.num_subject_images, len(found)) == (6, 8)


def test_a_dataset_of_ones_own_may_be_repeated() -> None:
    own = [(Image.new("RGB", (64, 64), (red, 0, 0)), "a disc", f"red {red}") for red in (0, 99)]
    found = open_pictures(TrainConfig(repeats=3), locate("tiny"), own).first
    assert (found.ids, found.repeats) == (["data/red 0", "data/red 99"], [3, 3])
    with pytest.raises(UsageError, match="repeats: 2 numbers for 1 --data"):
        open_pictures(TrainConfig(repeats=(3, 1)), locate("tiny"), own)


def test_a_link_out_of_the_folder_is_refused_where_that_is_asked_for(
    tmp_path: Path, make_pictures: Callable[..., Path]
) -> None:
    data, other = make_pictures(tmp_path / "data", count=3), make_pictures(tmp_path / "other", count=1)
    (data / "within.png").symlink_to(data / "00.png")
    given = {"data": str(data), "prompt": "a disc", "validation_fraction": 0.0}
    found = locate("tiny")
    assert len(open_pictures(TrainConfig(**given, follow_links=False), found, None).first) == 4
    (data / "out.png").symlink_to(other / "00.png")
    (data / "more").symlink_to(other)
    assert len(open_pictures(TrainConfig(**given), found, None).first) == 6
    with pytest.raises(DataError, match=r"2 links out of the folder, which --no_follow_links refuses: more, out.png"):
        open_pictures(TrainConfig(**given, follow_links=False), found, None)

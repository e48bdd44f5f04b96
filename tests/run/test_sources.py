from collections.abc import Callable
from pathlib import Path

import datasets
from PIL import Image

from finetune.data.datasets import HuggingFaceDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.own import OwnPictures
from finetune.run.sources import digest


def test_other_pixels_under_the_same_names_are_other_pictures(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_pictures(tmp_path / "data", count=3)
    before = digest(ImageFolder(folder, prompt="a disc"))
    assert digest(ImageFolder(folder, prompt="a disc", resolution=64)) == before
    Image.new("RGB", (80, 64), "blue").save(folder / "00.png")
    after = ImageFolder(folder, prompt="a disc")
    assert digest(after) != before
    assert digest(OwnPictures(after)) == digest(after)


def test_rows_that_were_filtered_are_other_pictures(pictures: Path) -> None:
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in sorted(pictures.glob("*.png"))]})
    first, last = (HuggingFaceDataset(rows.select(some), prompt="a disc") for some in ([0, 1], [4, 5]))
    assert (first.ids, first.captions) == (last.ids, last.captions)
    assert digest(first) != digest(last)


def test_a_dataset_of_ones_own_is_known_by_its_pixels() -> None:
    red, blue = (OwnPictures([(Image.new("RGB", (8, 8), colour), "a", "1")]) for colour in ("red", "blue"))
    assert digest(red) != digest(blue)

import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from finetune.data.datasets import HuggingFaceDataset, open_dataset
from finetune.data.image_checks import RejectedImage
from finetune.data.image_folder import ImageFolder
from finetune.data.transforms import Preprocess
from finetune.errors import DataError, UsageError

RED = (255, 0, 0)


def save(path: Path, size: tuple[int, int] = (8, 8), color: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Tables are converted into a cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def folder_of_five(root: Path) -> Path:
    for number in range(4):
        save(root / "sub" / f"{number}.png", size=(8 + number, 20), color=(number, 0, 0))
    (root / "sub" / "1.txt").write_text("a [trigger] dog")
    (root / "sub" / "2.caption").write_text("two")
    (root / "broken.png").write_bytes(b"nothing")
    (root / "broken.txt").write_text("a caption that is not counted")
    (root / "left.txt").write_text("over")
    return root


def test_a_folder_tells_all_that_it_found(tmp_path: Path):
    images = ImageFolder(folder_of_five(tmp_path), "a pet", resolution=10)
    assert images.ids == [f"sub/{number}.png" for number in range(4)]
    assert images.captions == ["a pet", "a dog", "two", "a pet"]
    assert images.sources == {"prompt": 2, "txt": 1, "caption": 1}
    assert images.quarantined == [RejectedImage("broken.png", "not an image in a supported format")]
    assert images.orphans == ["left.txt"]
    assert images.triggerless == 1
    assert images.small == 2
    assert len(images) == 4


def test_the_trigger_word_is_in_every_caption(tmp_path: Path):
    images = ImageFolder(folder_of_five(tmp_path), trigger="sks")
    assert images.captions == ["sks", "a sks dog", "sks two", "sks"]
    assert images.triggerless == 0
    assert images.sources == {"none": 2, "txt": 1, "caption": 1}


def test_an_example_is_the_picture_in_its_own_size(tmp_path: Path):
    images = ImageFolder(folder_of_five(tmp_path), "a pet")
    image, caption, name = images[2]
    assert (image.size, image.getpixel((0, 0)), caption, name) == ((10, 20), (2, 0, 0), "two", "sub/2.png")


def test_options_reach_the_transform(tmp_path: Path):
    save(tmp_path / "a.png")
    options = {"resolution": 64, "resize_mode": "squash", "center_crop": False, "random_flip": True}
    assert ImageFolder(tmp_path, **options).transform == Preprocess(
        64, resize_mode="squash", center_crop=False, random_flip=True
    )
    rows = datasets.Dataset.from_dict({"image": [png(Image.new("RGB", (2, 2)))]})
    assert HuggingFaceDataset(rows, **options).transform == Preprocess(
        64, resize_mode="squash", center_crop=False, random_flip=True
    )
    with pytest.raises(UsageError, match="resolution = 0"):
        ImageFolder(tmp_path, resolution=0)


def test_ids_do_not_depend_on_where_the_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = folder_of_five(tmp_path / "one")
    shutil.copytree(first, tmp_path / "else" / "where")
    monkeypatch.chdir(tmp_path / "else")
    ids = [ImageFolder(folder).ids for folder in (first, "where", "./where/../where/", "../one")]
    assert all(found == ids[0] for found in ids)


@pytest.mark.skipif(os.name != "posix", reason="names that are not Unicode exist on POSIX systems")
def test_a_name_that_is_not_utf8_is_an_id_like_any_other(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    try:
        save(path)
    except OSError:
        pytest.skip("this file system allows no such name")
    path.with_suffix(".txt").write_text("coffee")
    images = ImageFolder(tmp_path)
    assert images.ids == ["caf\udce9.png"]
    assert images[0].caption == "coffee"


def test_a_folder_that_is_none_or_has_no_pictures_is_an_error(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nowhere: no such folder$"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"a\.png: not a folder$"):
        ImageFolder(save(tmp_path / "one" / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no image found; expected \.jpg .*\.avif$"):
        ImageFolder(tmp_path / "empty")


def test_if_no_picture_can_be_read_the_first_is_named(tmp_path: Path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    with pytest.raises(DataError, match=r"none of 2 images can be trained on; the first: a\.png: the file is empty$"):
        ImageFolder(tmp_path)


def test_a_picture_that_vanishes_is_named_by_its_id(tmp_path: Path):
    save(tmp_path / "sub" / "a.png")
    images = ImageFolder(tmp_path)
    (tmp_path / "sub" / "a.png").unlink()
    with pytest.raises(DataError, match=r"^sub/a\.png: No such file"):
        images[0]


def test_datasets_travel_to_worker_processes(tmp_path: Path):
    images = pickle.loads(pickle.dumps(ImageFolder(folder_of_five(tmp_path), "a pet")))
    loader = DataLoader(images, batch_size=None, num_workers=1, generator=torch.Generator())
    assert [example.id for example in loader] == images.ids


def rows_of_four() -> datasets.Dataset:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pictures = [
        {"bytes": png(Image.new("RGB", (4, 2), RED), exif=exif), "path": None},
        {"bytes": b"broken", "path": None},
        {"bytes": png(Image.fromarray(np.full((6, 6), 65535, dtype=np.uint16))), "path": None},
        None,
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": pictures, "text": ["one\ntwo", "x", None, "y"]}, features=features)


def test_rows_tell_all_that_they_hold():
    data = HuggingFaceDataset(rows_of_four(), "a thing", trigger="sks", resolution=6)
    assert data.ids == ["row 0", "row 2"]
    assert data.captions == ["sks one two", "sks a thing"]
    assert data.sources == {"column": 1, "prompt": 1}
    assert data.quarantined == [
        RejectedImage("row 1", "not an image in a supported format"),
        RejectedImage("row 3", "no image in this row"),
    ]
    assert (data.orphans, data.triggerless, data.small) == ([], 0, 1)
    assert (data[0].image.size, data[0].image.getpixel((0, 0))) == ((2, 4), RED)
    assert (data[1].image.getpixel((0, 0)), data[1].id) == ((255, 255, 255), "row 2")
    assert pickle.loads(pickle.dumps(data))[1] == data[1]


def test_pictures_may_be_bytes_or_paths_and_captions_lists(tmp_path: Path):
    path = save(tmp_path / "a.png", size=(3, 3))
    captions = [["first", "second"], []]
    by_path = datasets.Dataset.from_dict({"photo": [str(path), "nowhere.png"], "labels": captions})
    data = HuggingFaceDataset(by_path, image_column="photo", caption_column="labels")
    assert (data.ids, data.captions, data[0].image.size) == (["row 0"], ["first"], (3, 3))
    assert data.quarantined == [RejectedImage("row 1", "No such file or directory")]
    by_bytes = datasets.Dataset.from_dict({"photo": [path.read_bytes()] * 2, "labels": captions})
    data = HuggingFaceDataset(by_bytes, "p", image_column="photo", caption_column="labels")
    assert (data.captions, data.sources) == (["first", "p"], {"column": 1, "prompt": 1})


def test_without_a_caption_column_every_row_takes_the_prompt():
    rows = rows_of_four().remove_columns("text")
    assert HuggingFaceDataset(rows, "a thing").captions == ["a thing", "a thing"]


def test_selected_and_formatted_rows_are_taken_as_they_are():
    rows = rows_of_four().select([2, 0])
    rows.set_transform(lambda batch: {"image": [0 for _ in batch["image"]]})
    data = HuggingFaceDataset(rows)
    assert data.captions == ["", "one two"]
    assert data[1].image.size == (2, 4)
    assert rows[0] == {"image": 0}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"photo": [b""]}, {}, "--image_column image: no such column; there are photo"),
        ({"image": [3]}, {}, "--image_column image: holds Value('int64'), not images"),
        (
            {"image": [b""]},
            {"caption_column": "title"},
            "--caption_column title: no such column; there are image",
        ),
        ({"image": [b""], "text": [3]}, {}, "--caption_column text: row 0 holds 3, expected text"),
        ({"image": []}, {}, "the dataset has no rows"),
        (
            {"image": [b""]},
            {},
            "the dataset: none of 1 image can be trained on; the first: row 0: the file is empty",
        ),
    ],
)
def test_columns_that_cannot_work_are_named(columns: dict, options: dict, message: str):
    with pytest.raises(DataError) as caught:
        HuggingFaceDataset(datasets.Dataset.from_dict(columns), **options)
    assert str(caught.value) == message


def test_several_splits_at_once_are_refused():
    splits = datasets.DatasetDict({"train": rows_of_four()})
    with pytest.raises(DataError, match=r"a DatasetDict is not a datasets\.Dataset; give one split"):
        HuggingFaceDataset(splits)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The hosts that were looked for on the network."""
    hosts: list[tuple] = []

    def refuse(*arguments: object, **_: object) -> None:
        hosts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return hosts


@pytest.mark.parametrize("layout", ["parquet", "parquet folder", "arrow", "arrow folder", "saved", "saved splits"])
def test_tables_on_disk_are_opened_without_the_network(tmp_path: Path, layout: str, asked: list[tuple]):
    rows = rows_of_four()
    source = tmp_path / "tables"
    source.mkdir()
    if layout == "saved":
        rows.save_to_disk(source)
    elif layout == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(source)
    elif layout == "parquet":
        source = tmp_path / "one [1].parquet"
        rows.to_parquet(source)
    elif layout == "parquet folder":
        (source / "data").mkdir()
        rows.to_parquet(source / "data" / "train-00000-of-00001.parquet")
        rows.select([0]).to_parquet(source / "data" / "test-00000-of-00001.parquet")
    else:
        rows.save_to_disk(tmp_path / "saved")
        arrow = shutil.copy(next((tmp_path / "saved").glob("*.arrow")), source / "a.arrow")
        source = source if layout == "arrow folder" else Path(arrow)
    data = open_dataset(str(source), "a thing", resolution=6)
    assert isinstance(data, HuggingFaceDataset)
    assert (data.ids, data.captions, data.small) == (["row 0", "row 2"], ["one two", "a thing"], 1)
    assert asked == []


def test_a_folder_of_pictures_is_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple]):
    save(tmp_path / "pets" / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    data = open_dataset("~/pets", "a pet", trigger="sks", resolution=6)
    assert isinstance(data, ImageFolder)
    assert (data.captions, data.transform) == (["sks a pet"], Preprocess(6))
    with pytest.raises(UsageError, match="--image_column is for Hugging Face datasets; ~/pets holds images"):
        open_dataset("~/pets", image_column="photo")
    assert asked == []


def test_splits_without_train_are_named(tmp_path: Path):
    rows = rows_of_four()
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"no split called train; there are a, b$"):
        open_dataset(str(tmp_path / "two"))
    datasets.DatasetDict({"a": rows}).save_to_disk(tmp_path / "one")
    assert len(open_dataset(str(tmp_path / "one"))) == 2


def test_pictures_beside_tables_are_an_error(tmp_path: Path):
    save(tmp_path / "a.png")
    (tmp_path / "b.parquet").touch()
    with pytest.raises(DataError, match=r"holds images and \.parquet files; name one of them$"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["bad.parquet", "bad.arrow"])
def test_a_broken_table_is_named_in_one_line(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"this is no table")
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / name))
    assert str(caught.value).startswith(f"--data {tmp_path / name}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["imagess", "./imagess", "/nowhere/at/all", "~/imagess", "a/b/c", "../no-such-folder", "images/"]
)
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(source: str, asked: list[tuple]):
    with pytest.raises(UsageError) as caught:
        open_dataset(source)
    assert str(caught.value).startswith(f"--data {source}: no such folder")
    assert asked == []


def test_an_empty_source_and_a_file_are_usage_errors(tmp_path: Path):
    with pytest.raises(UsageError, match="--data is empty"):
        open_dataset("")
    with pytest.raises(UsageError, match=r"a\.png: not a folder; expected folders and \.tar \.parquet \.arrow files"):
        open_dataset(str(save(tmp_path / "a.png")))


def test_an_unreachable_hub_is_one_line_that_also_says_no_such_folder(tmp_path: Path):
    script = """
from finetune.data.datasets import open_dataset
from finetune.errors import DataError
try:
    open_dataset("owner/imagess")
except DataError as error:
    print(error)
"""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    # Nothing listens on port 9 of the loopback; the package is found from the checkout.
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith("--data owner/imagess: no such folder, and the hub was not reachable (")
    assert result.stdout.endswith("); give a local folder of images\n")
    assert result.stdout.count("\n") == 1
    assert "Retrying" not in result.stderr


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("a.txt", "b.docx", "c.DOCX", "LICENSE", "metadata.jsonl", ".hidden.zip"):
        (tmp_path / name).write_text("")
    notes = ImageFolder(tmp_path, resolution=8).notes()
    assert "ignored files (neither image nor caption): 2 .docx, 1 without an ending" in notes


def test_folders_named_for_repeats_and_triggers_that_read_badly_are_noted(tmp_path: Path):
    for name in ("10_dog/a.png", "10_dog/b.png", "cats/c.png"):
        save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a photo of a dog")
    (tmp_path / "cats/c.txt").write_text("a photo of [trigger] cat")
    notes = ImageFolder(tmp_path, trigger="sks", resolution=4).notes()
    assert "folder names not read as repeats, because other folders hold images too: 10_dog" in notes
    where = "the trigger is put in front of 2 captions; to place it yourself: 'a photo of [trigger] dog'"
    assert where in notes
    assert not any("trigger is put" in note for note in ImageFolder(tmp_path, resolution=4).notes())
    for old, new in (("10_dog", "1_dog"), ("cats", "1_cat")):
        (tmp_path / old).rename(tmp_path / new)
    assert not any("repeats" in note for note in ImageFolder(tmp_path, resolution=4).notes())


def test_empty_caption_files_are_counted(tmp_path: Path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    assert "empty caption files (1): a.txt" in ImageFolder(tmp_path, prompt="x", resolution=4).notes()

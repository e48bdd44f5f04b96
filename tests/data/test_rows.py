"""Rows of a dataset on the disk: read once, remembered like files."""

import shutil
from pathlib import Path

import datasets
import datasets.config
import pyarrow as pa
import pytest
from PIL import Image

from finetune.data.datasets import HuggingFaceDataset, open_dataset
from finetune.data.hub_dataset import _picture
from finetune.data.image_index import ImageIndex
from finetune.errors import DataError, UsageError
from tests.data.test_datasets import png, save


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are converted into a cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("form", ["parquet", "arrow", "saved"])
def test_rows_on_the_disk_are_read_once_and_again_where_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    read: list[int] = []
    whole = HuggingFaceDataset._bytes

    def pluralize(self: HuggingFaceDataset, place: int) -> bytes:
        read.append(place)
        return whole(self, place)

    monkeypatch.setattr(HuggingFaceDataset, "_bytes", pluralize)

    def write(colors: list[int]) -> Path:
        pictures = [{"bytes": png(Image.new("RGB", (8, 8), (color, 0, 0))), "path": None} for color in colors]
        rows = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
        if form == "parquet":
            rows.to_parquet(tmp_path / "rows.parquet")
            return tmp_path / "rows.parquet"
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        rows.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved" if form == "saved" else next((tmp_path / "saved").glob("*.arrow"))

    def opened(place: Path, **options: bool) -> list[str]:
        memory = ImageIndex(tmp_path / "memory", **options)
        found = open_dataset(str(place), "a thing", resolution=8, memory=memory)
        assert found[1].image.getpixel((0, 0)) == (20, 0, 0)
        return list(found.contents)

    place = write([10, 20, 30])
    first = opened(place)
    assert sorted(read) == [0, 1, 1, 2]  # to check all, and for the one that is shown
    assert opened(place) == first
    assert read[4:] == [1]
    assert opened(place, strict=True) == first
    assert sorted(read[5:]) == [0, 1, 1, 2]
    changed = opened(write([10, 20, 99]))
    assert sorted(read[9:]) == [0, 1, 1, 2]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, True, False]


def test_rows_that_name_files_are_known_by_those_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.png", color=(number, 0, 0)) for number in range(2)]
    table = pa.table({"image": [{"bytes": None, "path": str(path)} for path in paths]})
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)

    def first() -> str:
        memory = ImageIndex(tmp_path / "memory")
        return open_dataset(str(tmp_path / "rows.arrow"), "a thing", resolution=8, memory=memory).contents[0]

    before = first()
    assert first() == before
    save(paths[0], color=(9, 9, 9))
    assert first() != before


def table_of_paths(folder: Path, *paths: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths]})
    with pa.ipc.new_stream(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    return folder / "rows.arrow"


def test_a_row_names_no_file_outside_of_its_dataset(tmp_path: Path) -> None:
    """What somebody has published must not read what lies on this machine."""
    secret = save(tmp_path / "secret/a.png")
    save(tmp_path / "data/own.png")
    (tmp_path / "data/link.png").symlink_to(secret)
    rows = table_of_paths(tmp_path / "data", "own.png", str(secret), "../secret/a.png", "link.png", "/etc/passwd")
    opened = open_dataset(str(rows), "a thing", resolution=8)
    assert opened.ids == ["row 0"]
    reasons = [bad.reason for bad in opened.quarantined]
    assert len(reasons) == 4
    assert all("the row names a file outside of the dataset" in reason for reason in reasons)


def test_a_row_of_a_stream_names_files_on_the_hub_alone(tmp_path: Path) -> None:
    secret = save(tmp_path / "a.png")
    for path in (str(secret), f"zip://a.png::file://{secret}", f"file://{secret}"):
        row = {"image": {"bytes": None, "path": path}}
        with pytest.raises(DataError, match="row 3 names a file outside of the hub"):
            _picture(row, 3, "image", from_hub=True)
    own = _picture({"image": {"bytes": None, "path": str(secret)}}, 3, "image", from_hub=False)
    assert own == {"bytes": secret.read_bytes(), "path": None}


def test_rows_have_the_prompt_as_their_caption_and_no_names() -> None:
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["from the column"]})
    alike = HuggingFaceDataset(rows, "a cat", caption_source="prompt", resolution=8)
    assert alike.captions == ["a cat"]
    with pytest.raises(UsageError, match="caption_source filename is for folders of images and shards"):
        HuggingFaceDataset(rows, caption_source="filename", resolution=8)

"""Datasets that can only be iterated."""

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import ExifTags, Image

from finetune.config import TrainConfig
from finetune.data import hub_dataset
from finetune.data.datasets import HuggingFaceDataset, open_dataset
from finetune.data.hub_dataset import first_hub_rows as streamed_from_hub
from finetune.data.hub_dataset import kept
from finetune.data.images import to_rgb
from finetune.errors import DataError, RunError, UsageError
from finetune.recipe import fine_tune
from finetune.seeding import wide_fold
from tests.hub_server import Hub, Repository, hub_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs are here."""


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (10 * number, 90, 0)).save(file, kind)
    return file.getvalue()


class Source:
    """A stream of rows that counts those that were asked for, and may break off."""

    def __init__(self, rows: int, breaks_at: int | None = None) -> None:
        self.rows, self.breaks_at, self.asked = rows, breaks_at, 0

    def __call__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.rows):
            if number == self.breaks_at:
                raise ConnectionError("Connection reset by peer")
            self.asked += 1
            yield {"image": {"bytes": encoded(number), "path": None}, "text": f"image {number}", "more": number}

    def stream(self) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(self)


def captions(rows: datasets.Dataset) -> list[str]:
    return list(rows["text"])


def test_rows_pass_once_and_come_as_they_were(tmp_path: Path) -> None:
    source = Source(7)
    rows = kept(source.stream, tmp_path, "image", "text", None)
    assert source.asked == 7
    assert captions(rows) == [f"image {number}" for number in range(7)]
    assert sorted(rows.column_names) == ["image", "text"]
    plain = rows.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in plain] == [encoded(number) for number in range(7)]
    assert captions(kept(source.stream, tmp_path, "image", "text", None)) == captions(rows)
    assert source.asked == 7  # nothing is asked again


def test_only_as_many_are_asked_for_as_are_wanted(tmp_path: Path) -> None:
    source = Source(20)
    assert captions(kept(source.stream, tmp_path, "image", "text", 4)) == [f"image {number}" for number in range(4)]
    assert source.asked == 4
    assert len(kept(source.stream, tmp_path, "image", "text", 3)) == 3
    assert source.asked == 4
    more = kept(source.stream, tmp_path, "image", "text", 9)
    assert captions(more) == [f"image {number}" for number in range(9)]
    assert len(kept(source.stream, tmp_path, "image", "text", 100)) == 20
    asked = source.asked
    assert len(kept(source.stream, tmp_path, "image", "text", 100)) == 20  # it is known that there are no more
    assert source.asked == asked
    assert len(kept(None, tmp_path, "image", "text", 5)) == 5


def test_a_stream_that_breaks_off_goes_on_after_its_last_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_dataset, "_ROWS", 3)
    with pytest.raises(
        DataError, match="stream failed at row 8: Connection reset by peer; run the same command to continue"
    ):
        kept(Source(11, breaks_at=8).stream, tmp_path, "image", "text", None)
    (tmp_path / ".chunk-2-1.part").mkdir()  # of a process that was killed
    whole = kept(Source(11).stream, tmp_path, "image", "text", None)
    assert captions(whole) == [f"image {number}" for number in range(11)]
    assert [len(datasets.load_from_disk(chunk)) for chunk in sorted(tmp_path.glob("chunk-*"))] == [3, 3, 3, 2]


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "I;16", "P"])
def test_decoded_pictures_keep_their_pixels_orientation_and_profile(tmp_path: Path, mode: str) -> None:
    image = Image.effect_noise((64, 48), 80).convert("RGB").convert(mode)
    image.info["icc_profile"] = profile = b"a profile"
    image.getexif()[ExifTags.Base.Orientation] = 6
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"image": image}]))
    (row,) = kept(lambda: stream, tmp_path, "image", "text", None).cast_column("image", datasets.Image(decode=False))
    with Image.open(io.BytesIO(row["image"]["bytes"])) as found:
        found.load()
        assert found.mode == mode
        assert found.info["icc_profile"] == profile
        upright = to_rgb(found)
    assert upright.size == (48, 64)
    assert upright.tobytes() == to_rgb(image).tobytes()


def test_two_runs_at_once_keep_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_dataset, "_ROWS", 4)
    source = Source(30)
    with ThreadPoolExecutor() as pool:
        short, long = (pool.submit(kept, source.stream, tmp_path, "image", "text", count) for count in (9, 21))
    assert captions(short.result()) == [f"image {number}" for number in range(9)]
    assert captions(long.result()) == [f"image {number}" for number in range(21)]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        kept(Source(3).stream, tmp_path / "file/rows", "image", "text", None)


def test_chunks_are_as_large_as_memory_shall_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_dataset, "_BYTES", 2 * min(len(encoded(number)) for number in range(5)))
    kept(Source(5).stream, tmp_path, "image", "text", None)
    assert [len(datasets.load_from_disk(chunk)) for chunk in sorted(tmp_path.glob("chunk-*"))] == [2, 2, 1]


@pytest.mark.parametrize("form", ["picture", "path", "bytes", "nothing", "broken"])
def test_pictures_of_any_form_are_kept_as_bytes(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(3))
    value = {
        "picture": Image.open(io.BytesIO(encoded(3))), "path": str(tmp_path / "a.png"), "bytes": encoded(3),
        "nothing": None, "broken": b"no image",
    }[form]  # fmt: skip
    rows = [{"image": value, "text": ["one", "two"]}, {"image": encoded(1), "text": "alone"}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    pictures = HuggingFaceDataset(kept(lambda: stream, tmp_path / "kept", "image", "text", None), resolution=64)
    if form in ("nothing", "broken"):
        assert [bad.path for bad in pictures.quarantined] == ["row 0"]
        assert pictures.ids == ["row 1"]
    else:
        (tmp_path / "a.png").unlink()
        assert pictures[0].image.getpixel((0, 0)) == (30, 90, 0)
        assert pictures.texts(0) == ("one", "two")
    assert pictures.texts(pictures.ids.index("row 1")) == ("alone",)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"image": encoded(0)}, ("image", "words"), "--caption_column words: no such column; there are image"),
        (
            {"jpg": encoded(0), "text": "x"},
            ("image", "text"),
            "--image_column image: no such column; there are jpg",
        ),
        ({"image": encoded(0), "text": 5}, ("image", "text"), "--caption_column text: row 0 holds 5, expected text"),
        ({"image": 7, "text": "x"}, ("image", "text"), "--image_column image: row 0 holds int, no image"),
    ],
)
def test_other_columns_are_told(tmp_path: Path, row: dict[str, Any], columns: tuple[str, str], message: str) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([row]))
    with pytest.raises(DataError, match=message):
        kept(lambda: stream, tmp_path, *columns, None)


def test_a_stream_without_captions_or_rows(tmp_path: Path) -> None:
    bare = datasets.IterableDataset.from_generator(lambda: iter([{"image": encoded(0)}]))
    pictures = open_dataset(bare, "a prompt", resolution=64)  # pyright: ignore[reportArgumentType]
    assert pictures.captions == ["a prompt"]
    with pytest.raises(DataError, match="the dataset has no rows"):
        kept(Source(0).stream, tmp_path, "image", "text", None)


def test_a_stream_is_trained_on(tmp_path: Path) -> None:
    options = {"max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 0, "forgetting_prompts": 0}
    config = TrainConfig(output_dir=str(tmp_path / "out"), stream_rows=4, validation_fraction=0.0, **options)  # pyright: ignore[reportArgumentType]
    source = Source(50)
    fine_tune(config, source.stream())  # pyright: ignore[reportArgumentType]
    assert source.asked == 4
    assert json.loads((tmp_path / "out/ledger.json").read_text())["trained"] == 4
    with pytest.raises(UsageError, match="stream_rows is for an IterableDataset"):
        fine_tune(config, datasets.Dataset.from_list([{"image": None, "text": "x"}]))


TWICE = """
import hashlib
from pathlib import Path
import datasets
from finetune.data.hub_dataset import first_hub_rows
for _ in range(2):
    rows = first_hub_rows("someone/discs", 5, Path("kept"), "image", "text")
    contents = b"".join(row["image"]["bytes"] for row in rows.cast_column("image", datasets.Image(decode=False)))
    print(len(rows), hashlib.sha256(contents).hexdigest(), end=" ")
"""


def test_the_first_rows_of_a_dataset_on_the_hub_are_kept_and_need_no_hub_then(tmp_path: Path) -> None:
    pictures = [encoded(number, "JPEG") for number in range(12)]  # which would be others, decoded and encoded again
    rows = [{"image": {"bytes": content, "path": None}, "text": "an image"} for content in pictures]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with Hub() as hub:
        content = (tmp_path / "train.parquet").read_bytes()
        hub.repositories["someone/discs"] = Repository(files={"train.parquet": content})
        environment = hub_environment(hub.url, tmp_path / "hub") | {"PYTHONPATH": str(ROOT)}
        told = partial(subprocess.run, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
        twice = told([sys.executable, "-c", TWICE], env=environment)
        assert twice.stdout == 2 * f"5 {hashlib.sha256(b''.join(pictures[:5])).hexdigest()} ", twice.stderr
        assert "train.parquet" in hub.downloads
    command = [sys.executable, "-m", "finetune", "preview", "--data", "someone/discs", "--stream_rows", "4"]
    offline = told([*command, "--cache_dir", "kept"], env=environment | {"HF_HUB_OFFLINE": "1"})
    assert "4 of 4 images" in offline.stdout, offline.stderr
    with pytest.raises(UsageError, match="stream_rows needs a folder where rows are kept"):
        open_dataset("someone/discs", "x", stream_rows=4)


def test_without_a_hub_fewer_rows_than_are_wanted_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wanted = partial(streamed_from_hub, "someone/discs", folder=tmp_path, image_column="image", caption_column="text")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, and no rows of it are kept"):
        wanted(2)
    place, source = tmp_path / "rows" / wide_fold("someone/discs", "image", "text") / "revision", Source(4)
    kept(source.stream, place, "image", "text", 3)
    assert len(wanted(2)) == 2
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, and only 3 rows of it are kept"):
        wanted(4)
    kept(source.stream, place, "image", "text", None)
    assert len(wanted(10)) == 4  # there are no more


def test_what_is_on_this_machine_is_not_streamed(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"stream_rows is for datasets on the Hugging Face hub; .* is on this machine"):
        open_dataset(str(tmp_path), "x", stream_rows=3, kept_in=tmp_path)

"""The same pictures in every layout that users bring: each trains, and all share their encodings."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from pyarrow import Table, parquet

from finetune.cache.disk import existing_store
from finetune.cli import parse_train
from finetune.config import TrainConfig
from finetune.recipe import fine_tune

NAMES = ("00.png", "01.png", "02.png")
CAPTION = "a red disc"


def plain(source: Path, to: Path) -> dict[str, object]:
    shutil.copytree(source, to / "deep/down")
    return {"data": str(to), "prompt": CAPTION}


def sidecars(ending: str) -> Callable[[Path, Path], dict[str, object]]:
    def layout(source: Path, to: Path) -> dict[str, object]:
        shutil.copytree(source, to)
        for name in NAMES:
            (to / name).with_suffix(ending).write_text(CAPTION)
        return {"data": str(to)}

    return layout


def rows() -> list[dict[str, str]]:
    return [{"file_name": name, "text": CAPTION} for name in NAMES]


def metadata(ending: str) -> Callable[[Path, Path], dict[str, object]]:
    def layout(source: Path, to: Path) -> dict[str, object]:
        shutil.copytree(source, to)
        file = to / f"metadata.{ending}"
        if ending == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        elif ending == "csv":
            file.write_text("file_name,text\n" + "".join(f"{name},{CAPTION}\n" for name in NAMES))
        else:
            parquet.write_table(Table.from_pylist(rows()), file)
        return {"data": str(to)}

    return layout


def repeats(source: Path, to: Path) -> dict[str, object]:
    shutil.copytree(source, to / f"5_{CAPTION}")
    return {"data": str(to)}


def dataset_file(source: Path, to: Path) -> dict[str, object]:
    shutil.copytree(source, to / "pictures")
    (to / "dataset.toml").write_text(
        f"""
        [general]
        caption_extension = ".txt"
        [[datasets]]
        resolution = 64
        batch_size = 3
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 128
        bucket_reso_steps = 8
        bucket_no_upscale = true
          [[datasets.subsets]]
          image_dir = "{to / "pictures"}"
          class_tokens = "{CAPTION}"
          num_repeats = 2
        """
    )
    config = parse_train(["--data", str(to / "dataset.toml"), "--seed", "0"])
    return {name: getattr(config, name) for name in config.given if name != "train_batch_size"}


def dreambooth(source: Path, to: Path) -> dict[str, object]:
    shutil.copytree(source, to / "instance")
    (to / "class").mkdir()
    shutil.move(to / "instance/02.png", to / "class/02.png")
    pair: dict[str, object] = {"instance_data_dir": str(to / "instance"), "class_data_dir": str(to / "class")}
    return pair | {"instance_prompt": CAPTION, "class_prompt": CAPTION}


def dataset(source: Path) -> datasets.Dataset:
    found = {"image": [{"bytes": (source / name).read_bytes(), "path": name} for name in NAMES], "text": [CAPTION] * 3}
    return datasets.Dataset.from_dict(found).cast_column("image", datasets.Image())


def tables(source: Path, to: Path) -> dict[str, object]:
    to.mkdir()
    dataset(source).to_parquet(str(to / "train.parquet"))
    return {"data": str(to)}


def saved(source: Path, to: Path) -> dict[str, object]:
    dataset(source).save_to_disk(to)
    return {"data": str(to)}


def shards(source: Path, to: Path) -> dict[str, object]:
    to.mkdir()
    for number, name in enumerate(NAMES):
        with tarfile.open(to / f"{number % 2}.tar", "a") as tar:
            tar.add(source / name, name)
            (to / "caption").write_text(CAPTION)
            tar.add(to / "caption", Path(name).with_suffix(".txt"))
    (to / "caption").unlink()
    return {"data": str(to / "*.tar")}


LAYOUTS: dict[str, Callable[[Path, Path], dict[str, object]]] = {
    "plain": plain,
    "txt": sidecars(".txt"),
    "caption": sidecars(".caption"),
    "metadata.jsonl": metadata("jsonl"),
    "metadata.csv": metadata("csv"),
    "metadata.parquet": metadata("parquet"),
    "repeats": repeats,
    "dreambooth": dreambooth,
    "dataset.toml": dataset_file,
    "parquet": tables,
    "saved": saved,
    "shards": shards,
}


def kept(cache: Path) -> int:
    store = existing_store(str(cache))
    try:
        return store.base.execute("SELECT count(*) FROM items").fetchone()[0]
    finally:
        store.close()


@pytest.fixture(scope="module")
def filled(make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The three pictures, and a cache in which a run has kept their encodings."""
    place = tmp_path_factory.mktemp("layouts")
    source = make_pictures(place / "source", count=3)
    train(source, place, place / "cache", "plain")
    return source, place / "cache"


def train(source: Path, place: Path, cache: Path, layout: str) -> Path:
    """A step from this layout."""
    options = LAYOUTS[layout](source, place / f"in-{layout}")
    basic = {"cache_dir": str(cache), "max_train_steps": 1, "train_batch_size": 3, "rank": 2, "num_inference_steps": 0}
    return fine_tune(TrainConfig(**basic, **options, output_dir=str(place / f"out-{layout}")))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_each_layout_trains_from_the_encodings_of_the_others(
    filled: tuple[Path, Path], tmp_path: Path, layout: str
) -> None:
    source, cache = filled
    before = kept(cache)
    assert before == 3 + 2  # a caption and the empty one
    out = train(source, tmp_path, cache, layout)
    assert kept(cache) == before
    assert json.loads((out / "metrics.jsonl").read_text())["examples"] == 3
    assert json.loads((out / "ledger.json").read_text())["trained"] == 3

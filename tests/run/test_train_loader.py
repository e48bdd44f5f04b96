"""A run whose pictures come in volumes: each is looked at, and encoded, when the run comes to it."""

import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from finetune.cache.disk import DiskStore
from finetune.cli import main
from finetune.config import TrainConfig, load_resolved
from finetune.data.chunks import Chunks
from finetune.errors import DataError, UsageError
from finetune.models.model_info import locate
from finetune.recipe import fine_tune
from finetune.run.build_dataset import open_pictures

FOUND = 24


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


@pytest.fixture
def many(make_pictures: Callable[..., Path], tmp_path: Path) -> Path:
    """24 pictures with captions, three volumes of eight."""
    return make_pictures(tmp_path / "many", count=FOUND, captions=True)


def options(data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    basic = {"data": str(data), "output_dir": str(folder), "volume_size": 8, "train_batch_size": 4, "rank": 4}
    little = {"sample_every": 0, "validation_fraction": 0.0, "forgetting_prompts": 0, "num_train_epochs": 1}
    return basic | little | {"lr_scheduler": "constant"} | more


def run(data: Path, folder: Path, **more: Any) -> Path:
    return fine_tune(TrainConfig(**options(data, folder, **more)))


def opened(data: Path, **more: Any) -> Chunks:
    config = TrainConfig(**options(data, data.parent / "out", **more))
    return open_pictures(config, locate("tiny"), None)


def record(folder: Path, name: str = "ledger.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def learned(folder: Path, step: int) -> tuple[bytes, str]:
    return (folder / f"checkpoint-{step}/trainable.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


def test_an_epoch_sees_every_picture_once_and_the_ledger_adds_up(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(many, tmp_path / "out")
    ledger = record(out)
    assert (ledger["found"], ledger["trained"], ledger["captions"], ledger["skipped"]) == (48, 24, 24, {})
    assert (ledger["steps"], ledger["visits"], ledger["visited"]) == (6, 24, 24)
    said = capsys.readouterr().out
    assert "24 images; 6 steps of batch size 4 (1 epoch)" in said
    assert "Volumes      3, each opened when training reaches it" in said


def test_only_what_is_visited_is_looked_at_and_encoded(many: Path, tmp_path: Path) -> None:
    out = run(many, tmp_path / "out", max_train_steps=2, cache_dir=str(tmp_path / "cache"))
    ledger = record(out)
    assert ledger["skipped"] == {"not looked at: the run did not come to their volumes": 32}
    assert (ledger["found"], ledger["trained"], ledger["visited"]) == (48, 8, 8)
    kinds = Counter(kind for (kind,) in DiskStore(tmp_path / "cache").base.execute("SELECT kind FROM items"))
    assert kinds == {"picture": 8, "caption": 9}


@pytest.fixture(scope="module")
def whole(make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """24 pictures, and a run of ten steps on them: an epoch, and the next one's first two volumes."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_pictures(folder / "many", count=FOUND, captions=True)
    return data, run(data, folder / "out", max_train_steps=10, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(
    ("stop", "how"), [(3, {"encode": "ahead", "cache_dir": "none"}), (8, {"encode": "before", "cache_dir": "new"})]
)
def test_a_run_cut_off_in_any_volume_equals_a_whole_one_however_it_encodes(
    whole: tuple[Path, Path], tmp_path: Path, stop: int, how: dict[str, Any]
) -> None:
    data, out = whole
    if how["cache_dir"] == "new":
        how = how | {"cache_dir": str(tmp_path / "cache")}
    parts = run(data, tmp_path / "out", max_train_steps=stop, **how)
    run(data, parts, max_train_steps=10, resume_from_checkpoint="latest", **how)
    assert learned(out, 10) == learned(parts, 10)
    assert record(out) == record(parts)
    assert (out / "volumes.jsonl").read_text() == (parts / "volumes.jsonl").read_text()


def test_what_cannot_be_read_is_told_when_the_run_comes_to_it(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = opened(many).at(2).ids[0]
    (many / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=f"1 of 8 images cannot be trained on: {name}: .*max_bad_fraction 0.13"):
        run(many, tmp_path / "out")
    out = run(many, tmp_path / "out", max_bad_fraction=0.2)
    assert f"note         volume 3: 1 image quarantined: {name}" in capsys.readouterr().out
    ledger = record(out)
    assert (ledger["found"], ledger["trained"], ledger["quarantined"], ledger["visited"]) == (48, 23, 1, 23)
    assert ledger["visits"] == FOUND  # another of its volume in its place
    assert json.loads((out / "quarantine.jsonl").read_text())["path"] == name


def test_a_few_captions_that_are_absent_do_not_end_a_run_in_a_later_volume(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = opened(many).at(1).ids[0]
    (many / name).with_suffix(".txt").unlink()
    with pytest.raises(UsageError, match=r"1 of 8 images without a caption \(03.png\): give --prompt"):
        opened(many).at(1)
    out = run(many, tmp_path / "out", max_bad_fraction=0.2)
    assert "note         volume 2: 1 image excluded: without a caption" in capsys.readouterr().out
    ledger = record(out)
    assert (ledger["found"], ledger["trained"], ledger["visited"]) == (47, 23, 23)
    assert ledger["skipped"] == {"without a caption": 1}


def test_copies_of_what_is_held_out_are_trained_on_in_no_volume(many: Path, tmp_path: Path) -> None:
    how = {"validation_fraction": 0.3}
    held = opened(many, **how).first
    original = held.ids[held.held_out[0]]
    copy = opened(many).at(1).ids[0]
    shutil.copy(many / original, many / copy)
    chunk = opened(many, **how).at(1)
    assert copy not in [chunk.ids[index] for index in chunk.trained]
    assert len(chunk.trained) == 7
    assert chunk.ledger().skipped == {"copies of images that are held out": 1}


def test_a_volume_that_has_changed_since_the_run_learned_from_it_is_told(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(many, tmp_path / "out", max_train_steps=4)
    changed = many / opened(many).at(1).ids[0]
    changed.with_suffix(".txt").write_text("another caption")
    run(many, out, max_train_steps=10, resume_from_checkpoint="latest")
    notes = [line for line in capsys.readouterr().out.splitlines() if "note         volume" in line]
    assert len(notes) == 1
    assert "note         volume 2: its images or captions have changed since this run read them" in notes[0]


def test_inspect_rebuilds_a_step_of_a_later_volume(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(many, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=9)
    capsys.readouterr()
    assert main(["inspect", "--run", str(out), "--step", "6"]) == 0
    said = capsys.readouterr().out
    logged = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert f"step 6: loss {logged[5]:.6f}, in metrics.jsonl {logged[5]:.6f}" in said
    shown = {line.split(":")[0] for line in said.splitlines() if ": timestep " in line}
    assert len(shown) == 4
    assert shown <= set(opened(many).at(2).ids)
    assert load_resolved(out / "config.toml").volume_size == 8


def test_the_cache_can_be_filled_with_every_volume(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert main(["cache", "encode", "--data", str(many), "--volume_size", "8", *cache]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" (")[2] for line in said] == [f"volume {n} of 3)" for n in (1, 2, 3)]
    run(many, tmp_path / "out", cache_dir=cache[1])
    kinds = Counter(kind for (kind,) in DiskStore(tmp_path / "cache").base.execute("SELECT kind FROM items"))
    assert kinds == {"picture": 24, "caption": 25}


def test_a_table_comes_in_volumes_too(many: Path, tmp_path: Path) -> None:
    files = sorted(map(str, many.glob("*.png")))
    table = datasets.Dataset.from_dict({"image": files, "text": [f"disc {number}" for number in range(FOUND)]})
    table.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "discs.parquet"))
    out = run(tmp_path / "discs.parquet", tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    ledger = record(out)
    assert (ledger["found"], ledger["trained"], ledger["visits"], ledger["visited"]) == (24, 24, 24, 24)
    chunks = opened(tmp_path / "discs.parquet", cache_dir=str(tmp_path / "cache"))
    seen = {name: text for n in range(3) for name, text in zip(chunks.at(n).ids, chunks.at(n).captions, strict=True)}
    assert seen == {f"row {number}": f"disc {number}" for number in range(FOUND)}
    own = fine_tune(TrainConfig(**options(many, tmp_path / "own") | {"data": ()}), table)
    assert record(own)["visited"] == FOUND


def test_shards_come_in_volumes_too(many: Path, tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(12 * shard, 12 * shard + 12):
                tar.add(many / f"{number:02d}.png", f"{number:02d}.png")
                tar.add(many / f"{number:02d}.txt", f"{number:02d}.txt")
    source, cache = tmp_path / "*.tar", str(tmp_path / "cache")
    ledger = record(run(source, tmp_path / "out", cache_dir=cache))
    assert (ledger["found"], ledger["trained"], ledger["captions"], ledger["visited"]) == (48, 24, 24, 24)
    chunks = opened(source, cache_dir=cache)
    seen = {name: text for n in range(3) for name, text in zip(chunks.at(n).ids, chunks.at(n).captions, strict=True)}
    names = {f"{number // 12}.tar/{number:02d}.png": f"a red disc, number {number}" for number in range(FOUND)}
    assert seen == names
    with pytest.raises(UsageError, match="with a cache_dir, shards"):
        opened(source, cache_dir="none")


def test_several_sources_come_in_volumes_together(
    many: Path, make_pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = make_pictures(tmp_path / "few", count=2, captions=True)
    names = [f"many/{number:02d}.png" for number in range(FOUND)] + ["few/00.png", "few/01.png"]
    config = TrainConfig(
        **options(many, tmp_path / "out", repeats=(1, 3), max_bad_fraction=0.5)
        | {"data": (str(many), str(few)), "volume_size": 9}
    )
    chunks = open_pictures(config, locate("tiny"), None)
    of_each = [chunks.at(number) for number in range(3)]
    assert sorted(name for some in of_each for name in some.ids) == sorted(names)
    assert [sum(some.repeats) for some in of_each] == list(chunks.visits)
    assert sorted(Counter(name.split("/")[0] for name in some.ids)["few"] for some in of_each) == [0, 1, 1]
    (few / "01.png").write_bytes(b"none")
    ledger = record(fine_tune(config))
    assert (ledger["found"], ledger["trained"], ledger["quarantined"], ledger["captions"]) == (52, 25, 1, 26)
    assert (ledger["visited"], ledger["visits"]) == (25, 4 * sum(-(-visits // 4) for visits in chunks.visits))
    told = [line for line in capsys.readouterr().out.splitlines() if "few/01.png" in line]
    assert told == ["note         volume 2: 1 image quarantined: few/01.png (not an image in a supported format)"]


def test_one_folder_may_be_repeated_in_volumes(many: Path) -> None:
    chunks = opened(many, repeats=2)
    assert [set(chunks.at(number).repeats) for number in range(3)] == [{2}, {2}, {2}]
    assert sum(chunks.visits) == 2 * FOUND
    assert chunks.digest != opened(many).digest


def test_class_pictures_are_not_dealt(many: Path, tmp_path: Path) -> None:
    config = TrainConfig(**options(many, tmp_path / "out", class_data=str(tmp_path)))
    with pytest.raises(UsageError, match=r"volume_size is for folders of images, .* and not for class_data"):
        open_pictures(config, locate("tiny"), None)

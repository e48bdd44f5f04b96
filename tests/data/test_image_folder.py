"""Folders as other trainers want them, and folders with every kind of bad file."""

import json
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from finetune.cache.encode import encode
from finetune.config import TrainConfig
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.data.sampler import Sampler
from finetune.errors import DataError, UsageError
from finetune.models.loading import load_model
from finetune.recipe import fine_tune


def save(path: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


def test_folders_named_for_repeats_give_repeats_and_captions(tmp_path: Path) -> None:
    for number, name in enumerate(("3_sks dog/a.png", "3_sks dog/deeper/b.png", "1_dog/c.png")):
        save(tmp_path / name, (number, 0, 0))
    (tmp_path / "1_dog/c.txt").write_text("its own")
    images = ImageFolder(tmp_path, resolution=64)
    assert dict(zip(images.ids, zip(images.repeats, images.captions, strict=True), strict=True)) == {
        "3_sks dog/a.png": (3, "sks dog"),
        "3_sks dog/deeper/b.png": (3, "sks dog"),
        "1_dog/c.png": (1, "its own"),
    }
    assert images.sources == {"folder": 2, "txt": 1}
    assert ImageFolder(tmp_path, "a prompt", resolution=64).captions.count("a prompt") == 2


@pytest.mark.parametrize("name", ["2024_holidays", "0_nothing", "dog_3", "3dogs"])
def test_other_names_of_folders_say_nothing(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / "a.png")
    images = ImageFolder(tmp_path, resolution=64)
    assert images.repeats == [1]
    assert images.captions == [""]


def test_a_repeated_picture_has_noise_of_its_own_at_each_visit(tmp_path: Path) -> None:
    save(tmp_path / "3_red dog/a.png", (255, 0, 0))
    save(tmp_path / "1_dog/b.png")
    encoded = encode(ImageFolder(tmp_path, resolution=64), load_model("tiny"), cache_dir="none")
    assert encoded.epoch_visits == 4
    keys: dict[str, set[int]] = {}
    for batch in batches(encoded, batch_size=4, steps=2):
        assert sorted(batch.ids) == ["1_dog/b.png"] + ["3_red dog/a.png"] * 3
        for name, key in zip(batch.ids, batch.keys.tolist(), strict=True):
            keys.setdefault(name, set()).add(key)
    assert {name: len(some) for name, some in keys.items()} == {"1_dog/b.png": 2, "3_red dog/a.png": 6}


def test_visits_of_repeated_examples_are_numbered_without_a_gap() -> None:
    sampler = Sampler([0, 1, 0], batch_size=2, seed=0, repeats=[2, 1, 3])
    visits = [visit for step in range(9) for visit in sampler.visits(step)]
    assert sorted(visits) == [(0, n) for n in range(6)] + [(1, n) for n in range(3)] + [(2, n) for n in range(9)]


def bad_files(folder: Path) -> dict[str, str]:
    """Every kind of bad file, and the beginning of what should be said of it."""
    save(folder / "good.jpg", (200, 100, 0))
    whole = (folder / "good.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[:-20])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image at all")
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")
    png = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))
    (folder / "nowhere.png").symlink_to(folder / "missing.png")
    save(folder / "latin.png", (1, 2, 3))
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    return {
        "truncated.jpg": "image file is truncated",
        "empty.png": "the file is empty",
        "text.png": "not an image in a supported format",
        "bomb.png": "more than ",
        "nowhere.png": "No such file",
        "latin.png": "latin.txt is not UTF-8 at byte 3",
    }


def odd_files(folder: Path, outside: Path) -> list[str]:
    """Files with strange names and places that are pictures all the same."""
    save(outside / "elsewhere.png", (9, 9, 9))
    (folder / "link.png").symlink_to(outside / "elsewhere.png")
    (folder / "loop").symlink_to(folder)
    names = ["with space.png", "quo\"te's.png", "new\nline.png", os.fsdecode(b"by\xfftes.png"), "same.png", "SAME.png"]
    for number, name in enumerate(names):
        save(folder / name, (number, 50, 50))
    (folder / "double.png").write_bytes((folder / "same.png").read_bytes())
    return ["good.jpg", "link.png", "double.png", *names]


def test_the_ledger_accounts_for_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    bad, good = bad_files(folder), odd_files(folder, tmp_path / "outside")
    for name in ("good.txt", "same.caption", "alone.txt", "notes.md", "model.bin"):
        (folder / name).write_text("an image")
    images = ImageFolder(folder, "x", resolution=64)
    assert sorted(images.ids) == sorted(good)
    reasons = {skipped.path: skipped.reason for skipped in images.quarantined}
    assert reasons.keys() == bad.keys()
    assert [name for name, begin in bad.items() if not reasons[name].startswith(begin)] == []
    ledger = images.ledger()
    assert (ledger.trained, ledger.quarantined, ledger.captions) == (9, 6, 3)
    assert ledger.skipped == {
        "caption files without an image": 1,
        "neither images nor captions: .bin": 1,
        "neither images nor captions: .md": 1,
    }
    assert ledger.found == sum(1 for file in folder.iterdir() if file.name != "loop")
    assert ledger.adds_up()


def test_a_run_writes_what_it_found_and_saw(tmp_path: Path) -> None:
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    bad, good = bad_files(folder), odd_files(folder, tmp_path / "outside")
    options = {"data": str(folder), "prompt": "x", "output_dir": str(out), "num_inference_steps": 0}
    with pytest.raises(DataError, match=r"6 of 15 images cannot be trained on: .* --max_bad_fraction 0\.4$"):
        fine_tune(TrainConfig(**options, max_train_steps=2))
    fine_tune(TrainConfig(**options, max_train_steps=2, train_batch_size=4, max_bad_fraction=0.4))
    ledger = json.loads((out / "ledger.json").read_text())
    assert {name: ledger[name] for name in ("found", "trained", "quarantined", "captions", "steps")} == {
        "found": 16, "trained": 9, "quarantined": 6, "captions": 1, "steps": 2,
    }  # fmt: skip
    assert (ledger["visited"], ledger["visits"], ledger["never_visited"]) == (8, 8, 1)
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == set(bad)
    assert len(good) == 9


@pytest.mark.parametrize("count", [100, 99])
def test_one_bad_picture_in_a_hundred_is_left_out_and_more_are_an_error(tmp_path: Path, count: int) -> None:
    from finetune.run.build_dataset import _refuse_unusable

    for number in range(count - 1):
        save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").touch()
    images = ImageFolder(tmp_path, "x", resolution=64)
    if count == 100:
        _refuse_unusable(images, 0.01, captioned=True)
    else:
        with pytest.raises(DataError, match=r"1 of 99 images cannot be trained on: bad\.png: the file is empty"):
            _refuse_unusable(images, 0.01, captioned=True)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (("img/10_sks dog/0.png", "reg/1_dog/0.png"), "give --data {0}/img --class_data {0}/reg"),
        (("train/a.png", "test/b.png"), "give --data {0}/train --validation_data {0}/test"),
        (("train/a.png", "validation/1/b.png"), "give --data {0}/train --validation_data {0}/validation"),
    ],
)
def test_a_folder_of_folders_with_parts_of_their_own_is_asked_about(
    tmp_path: Path, names: tuple[str, ...], advice: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    with pytest.raises(UsageError, match=re.escape(advice.format(tmp_path))):
        ImageFolder(tmp_path, "x")


def test_a_folder_whose_own_name_says_something_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "10_sks dog"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    (told,) = ImageFolder(folder).passed_over
    assert told == f"the folder's own name, 10_sks dog: give --data {tmp_path} for what it says"
    assert (ImageFolder(tmp_path).repeats, ImageFolder(tmp_path).captions) == ([10], ["sks dog"])


def test_two_captions_whose_endings_differ_in_letters_alone_are_both_accounted_for(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    for name in ("cat.txt", "cat.TXT"):
        (tmp_path / name).write_text("a cat")
    found = ImageFolder(tmp_path)
    assert found.ledger().adds_up()
    assert found.ledger().skipped == {"caption files without an image": 1}

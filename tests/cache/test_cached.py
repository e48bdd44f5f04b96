"""Encodings that are kept by content: what is encoded anew, and what is not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.cache.disk import SHARDS, DiskStore, existing_store
from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.cache.maintenance import contents, verify
from finetune.data.datasets import open_dataset
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.image_index import ImageIndex
from finetune.data.loader import batches
from finetune.data.user_dataset import MapDataset
from finetune.errors import DataError
from finetune.models.loading import DiffusionModel, load_model


@pytest.fixture(scope="module")
def tiny() -> DiffusionModel:
    return load_model("tiny")


@pytest.fixture
def folder(tmp_path: Path, make_pictures: Callable[..., Path]) -> Path:
    return make_pictures(tmp_path / "pictures", captions=True)


def made(encoded: EncodedDataset) -> dict[str, tuple[int, int]]:
    """Kind -> items, and how many of them were encoded just now."""
    return {row.kind: (row.items, row.new) for row in encoded.made}


@pytest.fixture
def encoded(tmp_path: Path, tiny: DiffusionModel) -> Callable[..., dict[str, tuple[int, int]]]:
    def count(dataset: ImageDataset | MapDataset | Path, **options: object) -> dict[str, tuple[int, int]]:
        pictures = ImageFolder(dataset, resolution=64) if isinstance(dataset, Path) else dataset
        return made(encode(pictures, tiny, cache_dir=tmp_path / "cache", **options))

    return count


Count = Callable[..., dict[str, tuple[int, int]]]


def test_a_second_run_encodes_nothing(folder: Path, encoded: Count, tiny: DiffusionModel, monkeypatch) -> None:
    assert encoded(folder) == {"caption": (7, 7), "picture": (6, 6)}

    def never(*_: object) -> Tensor:
        raise AssertionError("something was encoded")

    monkeypatch.setattr(type(tiny.encoder), "encode", never)
    monkeypatch.setattr(type(tiny.conditioner), "encode", never)
    assert encoded(folder) == {"caption": (7, 0), "picture": (6, 0)}


def test_one_edited_caption_and_one_edited_picture_are_one_text_and_one_picture(folder: Path, encoded: Count) -> None:
    encoded(folder)
    (folder / "01.txt").write_text("something else")
    Image.new("RGB", (70, 70), (1, 2, 3)).save(folder / "02.png")
    assert encoded(folder) == {"caption": (7, 1), "picture": (6, 1)}


def test_renamed_moved_and_doubled_pictures_are_encoded_once(folder: Path, encoded: Count) -> None:
    encoded(folder)
    (folder / "01.png").rename(folder / "renamed.png")
    (folder / "deeper").mkdir()
    shutil.copy(folder / "02.png", folder / "deeper" / "copy.png")
    assert encoded(ImageFolder(folder, "a red disc, number 1", resolution=64))["picture"] == (6, 0)


def test_the_same_pictures_in_other_layouts_have_the_same_entries(folder: Path, encoded: Count, tmp_path: Path) -> None:
    encoded(folder)
    files = sorted(folder.glob("*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "text": [file.with_suffix(".txt").read_text() for file in files],
    }
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / "all.parquet"))
    assert encoded(open_dataset(str(tmp_path / "all.parquet"), resolution=64)) == {
        "caption": (7, 0),
        "picture": (6, 0),
    }


@pytest.mark.parametrize(
    "options", [{"resolution": 32}, {"resize_mode": "squash"}, {"random_flip": True}, {"center_crop": False}]
)
def test_another_part_of_a_picture_is_another_encoding(folder: Path, encoded: Count, options: dict) -> None:
    encoded(folder)
    again = encoded(ImageFolder(folder, **({"resolution": 64} | options)))
    assert again["caption"] == (7, 0)
    assert again["picture"][1] >= 4  # two of six are square: no crop moves in them


def test_another_vae_invalidates_pictures_and_no_text(folder: Path, encoded: Count, tmp_path: Path) -> None:
    encoded(folder)
    other = load_model("tiny")
    with torch.no_grad():
        next(other.encoder.vae.parameters()).add_(1e-3)
    again = made(encode(ImageFolder(folder, resolution=64), other, cache_dir=tmp_path / "cache"))
    assert again == {"caption": (7, 0), "picture": (6, 6)}


@pytest.mark.parametrize("change", [{"max_token_length": 150}, {"clip_skip": 2}])
def test_another_way_to_read_captions_invalidates_text_and_no_picture(
    folder: Path, encoded: Count, tmp_path: Path, change: dict
) -> None:
    encoded(folder)
    other = load_model("tiny", **change)
    again = made(encode(ImageFolder(folder, resolution=64), other, cache_dir=tmp_path / "cache"))
    assert again == {"caption": (7, 7), "picture": (6, 0)}


def test_what_is_kept_equals_what_is_computed_to_the_bit(folder: Path, tiny: DiffusionModel, tmp_path: Path) -> None:
    images = ImageFolder(folder, resolution=64, random_flip=True, center_crop=False)
    places = ["none", tmp_path / "cache", tmp_path / "cache"]
    runs = [list(batches(encode(images, tiny, cache_dir=place), batch_size=4, steps=4)) for place in places]
    for in_memory, fresh, found in zip(*runs, strict=True):
        for other in (fresh, found):
            assert torch.equal(in_memory.latent_params, other.latent_params)
            assert torch.equal(in_memory.time_ids, other.time_ids)
            assert torch.equal(in_memory.cond["encoder_hidden_states"], other.cond["encoder_hidden_states"])


def test_half_precision_takes_half_of_the_room_and_is_near(folder: Path, tiny: DiffusionModel, tmp_path: Path) -> None:
    images = ImageFolder(folder, resolution=64)
    whole, half = (encode(images, tiny, cache_dir=tmp_path / name, precision=name) for name in ("fp32", "fp16"))
    sizes = [contents(existing_store(str(tmp_path / name))).bytes for name in ("fp32", "fp16")]
    assert sizes[1] < 0.52 * sizes[0]
    (a,), (b,) = (batches(each, batch_size=6, steps=1) for each in (whole, half))
    assert b.latent_params.dtype == torch.float32
    assert torch.equal(a.latent_params.half().float(), b.latent_params)
    assert torch.equal(a.cond["encoder_hidden_states"].half().float(), b.cond["encoder_hidden_states"])


def test_only_what_is_visited_is_encoded(folder: Path, encoded: Count) -> None:
    assert encoded(folder, visited=[(4, None), (1, None), (4, None)]) == {"caption": (3, 3), "picture": (2, 2)}
    assert encoded(folder) == {"caption": (7, 4), "picture": (6, 4)}


def test_what_verify_has_taken_out_is_encoded_anew(folder: Path, encoded: Count, tmp_path: Path) -> None:
    encoded(folder)
    shard = max((tmp_path / "cache" / SHARDS).iterdir(), key=lambda file: file.stat().st_mtime)  # that of the pictures
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(content)
    images = ImageFolder(folder, resolution=64)
    with pytest.raises(DataError, match="damaged"):
        list(batches(encode(images, load_model("tiny"), cache_dir=tmp_path / "cache"), batch_size=6, steps=1))
    assert len(verify(DiskStore(tmp_path / "cache"))[1]) == 1
    assert encoded(folder)["picture"] == (6, 1)


def test_a_picture_that_changes_before_it_is_encoded_is_an_error(folder: Path, encoded: Count, tmp_path: Path) -> None:
    images = ImageFolder(folder, resolution=64, memory=ImageIndex(tmp_path / "cache"))
    Image.new("RGB", (70, 70)).save(folder / "03.png")
    with pytest.raises(DataError, match=r"03\.png: the file has changed since the start"):
        encoded(images)


def test_after_an_error_the_rest_is_kept_and_can_be_encoded_in_the_same_process(folder: Path, encoded: Count) -> None:
    images = ImageFolder(folder, resolution=64)
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes((folder / "04.png").read_bytes())
    with pytest.raises(DataError, match=r"03\.png"):
        encoded(images)
    (folder / "03.png").write_bytes(whole)
    assert encoded(images) == {"caption": (7, 0), "picture": (6, 3)}  # what was claimed is free again


def test_pictures_of_ones_own_are_known_by_their_pixels(encoded: Count) -> None:
    class Own:
        def __init__(self, red: int) -> None:
            self.red = red

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
            return Image.new("RGB", (64, 64), (self.red * index, 0, 0)), "x", f"{index}"

    assert encoded(Own(50))["picture"] == (2, 2)
    assert encoded(Own(50))["picture"] == (2, 0)
    assert encoded(Own(60))["picture"] == (2, 1)


def test_what_a_cache_holds_of_another_environment_changes_no_bit(
    folder: Path, tiny: DiffusionModel, tmp_path: Path
) -> None:
    """Two threads add up in another order than one, and a run of two takes no encoding that one has made."""

    def encodings(threads: int, cache: str, **options: Any) -> tuple[int, list[dict[str, Tensor]]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = encode(ImageFolder(folder, resolution=64), tiny, cache_dir=tmp_path / cache, **options)
            keys = [next(iter(found.visits.keys(index, None))) for index in range(len(found))]
            return sum(made.new for made in found.made), [dict(item) for item in found.visits.store.load(keys)]
        finally:
            torch.set_num_threads(before)

    encodings(1, "shared")
    new, after_one = encodings(2, "shared")
    _, alone = encodings(2, "alone")
    assert new > 0
    assert all(torch.equal(a["stored"], b["stored"]) for a, b in zip(after_one, alone, strict=True))
    assert encodings(2, "shared")[0] == encodings(1, "shared")[0] == 0

    assert encodings(1, "any", any_environment=True)[0] > 0
    assert encodings(2, "any", any_environment=True)[0] == 0

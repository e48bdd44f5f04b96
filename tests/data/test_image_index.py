import os
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from finetune.data import image_checks
from finetune.data.image_checks import check_images
from finetune.data.image_folder import ImageFolder
from finetune.data.image_index import FILE, FileStamp, ImageIndex
from finetune.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(3):
        Image.new("RGB", (70 + number, 64), (number, 0, 0)).save(place / f"{number}.bmp")
    return place


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Contents that were decoded."""
    seen: list[bytes] = []
    real = image_checks.decoded_size

    def counting(content: bytes, name: str) -> tuple[int, int]:
        seen.append(content)
        return real(content, name)

    monkeypatch.setattr(image_checks, "decoded_size", counting)
    return seen


def opened(folder: Path, strict: bool = False) -> ImageFolder:
    return ImageFolder(folder, "x", resolution=64, memory=ImageIndex(folder.parent / "cache", strict=strict))


def test_unchanged_pictures_are_not_decoded_again(folder: Path, decoded: list[bytes]) -> None:
    first = opened(folder)
    assert len(decoded) == 3
    assert opened(folder).contents == first.contents
    assert opened(folder)._checked == first._checked
    assert len(decoded) == 3
    Image.new("RGB", (90, 64)).save(folder / "1.bmp")
    changed = opened(folder)
    assert len(decoded) == 4
    assert changed.contents[1] != first.contents[1]
    assert changed._checked[1].size == (90, 64)


def test_a_check_that_is_cut_off_goes_on_where_it_was(
    folder: Path, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_checks, "_TOGETHER", 1)
    monkeypatch.setattr(image_checks, "_NOTED", 1)
    monkeypatch.setattr(image_checks.os, "cpu_count", lambda: 1)
    counting = image_checks.decoded_size

    def stopped(content: bytes, name: str) -> tuple[int, int]:
        if name == "2.bmp":
            raise KeyboardInterrupt
        return counting(content, name)

    with monkeypatch.context() as patch:
        patch.setattr(image_checks, "decoded_size", stopped)
        with pytest.raises(KeyboardInterrupt):
            opened(folder)
    assert len(decoded) == 2
    assert len(opened(folder)) == 3
    assert len(decoded) == 3


def test_moved_and_copied_pictures_are_known_by_their_bytes(folder: Path, decoded: list[bytes]) -> None:
    opened(folder)
    (folder / "0.bmp").rename(folder / "9.bmp")
    (folder / "copy.bmp").write_bytes((folder / "1.bmp").read_bytes())
    assert len(opened(folder)) == 4
    assert len(decoded) == 3


def edit_unseen(path: Path) -> None:
    """Other pixels, with size, time and inode as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-30] ^= 255
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_that_keeps_size_and_time_is_caught_when_strict(folder: Path) -> None:
    first = opened(folder)
    edit_unseen(folder / "1.bmp")
    assert opened(folder).contents == first.contents
    strict = opened(folder, strict=True)
    assert [a == b for a, b in zip(strict.contents, first.contents, strict=True)] == [True, False, True]


def test_such_an_edit_is_never_encoded_under_the_old_pictures_key(folder: Path) -> None:
    opened(folder)
    edit_unseen(folder / "1.bmp")
    with pytest.raises(DataError, match=r"1\.bmp: the file has changed since the start"):
        opened(folder)[1]


def test_what_cannot_be_read_is_looked_at_again(folder: Path, decoded: list[bytes]) -> None:
    (folder / "bad.png").write_bytes(b"no image")
    assert [bad.path for bad in opened(folder).quarantined] == ["bad.png"]
    assert [bad.path for bad in opened(folder).quarantined] == ["bad.png"]
    assert decoded.count(b"no image") == 2


def test_a_folder_for_the_memory_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache_dir .*file"):
        ImageIndex(tmp_path / "file")


def test_names_of_any_bytes_are_remembered(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"n\xff 'quoted'\n.png")
    Image.new("RGB", (64, 64)).save(place)
    memory = ImageIndex(tmp_path / "cache")
    assert ImageFolder(tmp_path, "x", resolution=64, memory=memory).ids == [place.name]
    with sqlite3.connect(tmp_path / "cache" / "pictures.sqlite3") as base:
        assert base.execute("SELECT path FROM files").fetchall() == [(os.fsencode(place),)]


@pytest.mark.parametrize("content", [b"no database at all, and longer than its header " * 9, b""])
def test_a_damaged_one_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    first, second = (check_images(["a.png"], lambda _: file, ImageIndex(tmp_path)) for _ in range(2))
    assert [each.size for each in first] == [(8, 8)]
    assert first == second
    assert ImageIndex(tmp_path).digest(file, FileStamp.read(file)) == first[0].digest

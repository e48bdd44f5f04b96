"""Captions edited next to images: which file is written, conflicts, tags, and undo."""

import os
from pathlib import Path

import pytest

from finetune.errors import DataError, UsageError
from finetune.page.caption_edits import JOURNAL, NO_FILE, CaptionEdits, ConflictError, TagAction, tags_of


@pytest.fixture
def edits(tmp_path: Path) -> CaptionEdits:
    return CaptionEdits(tmp_path)


def test_a_first_caption_makes_a_txt_and_undo_deletes_it(edits: CaptionEdits) -> None:
    (edits.folder / "sub").mkdir()
    found = edits.read("sub/cat.png")
    assert (found.file, found.text, found.version) == ("sub/cat.txt", "", NO_FILE)
    edits.write("sub/cat.png", "a cat", version=NO_FILE)
    assert (edits.folder / "sub/cat.txt").read_bytes() == b"a cat"
    assert edits.undo() == 1
    assert not (edits.folder / "sub/cat.txt").exists()
    with pytest.raises(UsageError, match="no caption was edited here"):
        edits.undo()


@pytest.mark.parametrize("name", ["cat.caption", "cat.TXT", "cat.txt"])
def test_the_file_that_training_reads_is_the_one_that_is_written(edits: CaptionEdits, name: str) -> None:
    (edits.folder / name).write_text("a cat")
    found = edits.read("cat.png")
    edits.write("cat.png", "two cats", version=found.version)
    assert (edits.folder / name).read_text() == "two cats"
    assert sorted(os.listdir(edits.folder)) == sorted([JOURNAL, name])


def test_a_file_that_another_program_has_changed_is_not_overwritten(edits: CaptionEdits) -> None:
    (edits.folder / "cat.txt").write_text("a cat")
    version = edits.read("cat.png").version
    (edits.folder / "cat.txt").write_text("a lion")
    with pytest.raises(ConflictError, match=r"cat\.txt was changed"):
        edits.write("cat.png", "a tiger", version=version)
    assert (edits.folder / "cat.txt").read_text() == "a lion"


def test_undo_brings_back_every_byte_and_refuses_what_was_changed_since(edits: CaptionEdits) -> None:
    before = "a cät\r\n".encode("utf-16")
    (edits.folder / "cat.txt").write_bytes(before)
    edits.write("cat.png", "a lion", version=edits.read("cat.png").version)
    (edits.folder / "cat.txt").write_text("a bear")
    with pytest.raises(ConflictError, match="nothing is undone"):
        edits.undo()
    (edits.folder / "cat.txt").write_text("a lion")
    edits.undo()
    assert (edits.folder / "cat.txt").read_bytes() == before


def test_edits_are_undone_one_after_the_other_also_by_a_later_page(edits: CaptionEdits) -> None:
    for text in ("one", "two", "three"):
        edits.write("cat.png", text, version=edits.read("cat.png").version)
    for text in ("two", "one"):
        CaptionEdits(edits.folder).undo()
        assert (edits.folder / "cat.txt").read_text() == text
    edits.write("cat.png", "four", version=edits.read("cat.png").version)
    edits.undo()
    assert (edits.folder / "cat.txt").read_text() == "one"


@pytest.mark.parametrize(
    ("action", "text", "expected"),
    [
        ("add first", "cat, red", "new, cat, red"),
        ("add first", "", "new"),
        ("add first", "new, cat", "new, cat"),
        ("add last", "cat, red,\n", "cat, red, new"),
        ("remove", "new, cat", "cat"),
        ("remove", "cat, new, red", "cat, red"),
        ("remove", "cat, new", "cat"),
        ("remove", "newer, cat", "newer, cat"),
        ("remove", "new", ""),
        ("remove", "cat\nnew, red", "cat, red"),
        ("replace", "cat,  new,red", "cat,  better,red"),
        ("replace", "new, better", "better"),
        ("replace", "new, new", "better"),
    ],
)
def test_tags(edits: CaptionEdits, action: TagAction, text: str, expected: str) -> None:
    (edits.folder / "cat.txt").write_text(text)
    changed = edits.edit_tags(["cat.png"], action, " new ", "better")
    assert (edits.folder / "cat.txt").read_text() == expected
    assert changed == (text != expected)


def test_tags_of_many_are_one_edit(edits: CaptionEdits) -> None:
    for number in range(5):
        (edits.folder / f"{number}.txt").write_text("cat" if number else "dog")
    names = [f"{number}.png" for number in range(5)]
    assert edits.edit_tags(names, "replace", "cat", "lion") == 4
    assert tags_of((edits.folder / "3.txt").read_text()) == ["lion"]
    assert edits.undo() == 4
    assert {(edits.folder / f"{number}.txt").read_text() for number in range(1, 5)} == {"cat"}


def test_what_a_metadata_file_says_is_the_beginning_of_a_caption_file(tmp_path: Path) -> None:
    edits = CaptionEdits(tmp_path, {"cat.png": "a cat"}.get)
    assert edits.read("cat.png").text == "a cat"
    edits.edit_tags(["cat.png"], "add last", "red")
    assert (tmp_path / "cat.txt").read_text() == "a cat, red"


def test_what_cannot_be_read_or_written_is_named(edits: CaptionEdits, tmp_path: Path) -> None:
    (edits.folder / "cat.txt").write_bytes(b"\xff\xfa caf\xe9 text")
    with pytest.raises(DataError, match=r"cat.txt is not UTF-8 at byte 0"):
        edits.read("cat.png")
    (tmp_path.parent / "outside.txt").write_text("secret")
    (edits.folder / "dog.txt").symlink_to(tmp_path.parent / "outside.txt")
    with pytest.raises(DataError, match="a link out of the folder"):
        edits.read("dog.png")
    with pytest.raises(UsageError, match="expected a text"):
        edits.edit_tags([], "remove", " ")
    (edits.folder / JOURNAL).mkdir()
    with pytest.raises(DataError, match="Is a directory; what was changed before can be undone"):
        edits.write("bird.png", "a bird", version=NO_FILE)
    assert not (edits.folder / "bird.txt").exists()

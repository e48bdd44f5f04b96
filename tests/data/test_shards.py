"""Tar shards: what they hold, what is refused, and that a cut one is told."""

import io
import json
import pickle
import random
import sqlite3
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.datasets import open_dataset
from finetune.data.image_folder import ImageFolder
from finetune.data.image_index import ImageIndex
from finetune.data.shards import TarShards
from finetune.errors import DataError, UsageError


def picture(colour: str = "red", ending: str = "png") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (80, 64), colour).save(content, "jpeg" if ending == "jpg" else ending)
    return content.getvalue()


def encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def write(path: Path, members: Mapping[str, bytes | str], *more: tarfile.TarInfo) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in more:
            tar.addfile(info)
    return path


def opened(source: Path | str, **options: object) -> TarShards:
    found = open_dataset(str(source), **({"resolution": 64} | options))
    assert isinstance(found, TarShards)
    return found


def test_pictures_and_their_captions_in_every_form(tmp_path: Path) -> None:
    write(tmp_path / "s/0.tar", {"a.png": picture(), "a.txt": "from\ntxt", "deep/b.jpg": picture("blue", "jpg")})
    write(
        tmp_path / "s/1.tar",
        {
            "v1.5.png": picture(), "v1.5.json": json.dumps({"caption": ["one", "two"], "width": 80}),
            "v1.6.png": picture(), "v1.6.caption": "a caption",
            "c.PNG": picture(), "c.json": json.dumps({"text": "", "prompt": "a prompt"}), "c.TXT": "\ufefffirst",
        },
    )  # fmt: skip
    pictures = opened(tmp_path / "s", prompt="given")
    assert pictures.ids == ["0.tar/a.png", "0.tar/deep/b.jpg", "1.tar/v1.5.png", "1.tar/v1.6.png", "1.tar/c.PNG"]
    assert pictures.captions == ["from txt", "given", "one", "a caption", "first"]
    assert pictures.texts(2) == ("one", "two")
    assert pictures[1].image.getpixel((5, 5)) == (0, 0, 254)
    assert pictures.ledger().adds_up()
    assert pictures.ledger().captions == 5


def test_a_shard_a_folder_and_a_pattern_name_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(tmp_path / f"s/{number}.tar", {"a.png": picture(), "a.txt": str(number)})
    whole = opened(tmp_path / "s")
    assert opened(tmp_path / "s/*.tar").ids == whole.ids == ["0.tar/a.png", "1.tar/a.png", "2.tar/a.png"]
    assert opened(tmp_path / "s/[01].tar").ids == whole.ids[:2]
    assert opened(tmp_path / "*/1.tar").ids == ["s/1.tar/a.png"]
    assert opened(tmp_path / "s/2.tar").ids == whole.ids[2:]
    monkeypatch.chdir(tmp_path / "s")
    assert opened("*.tar").ids == whole.ids
    with pytest.raises(UsageError, match=r"--data s/x\*\.tar: no such files"):
        opened("s/x*.tar")
    with pytest.raises(UsageError, match=r"--data s/9\.tar: no such file"):
        opened("s/9.tar")


def test_the_pictures_are_those_of_a_folder(make_pictures: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "folder", captions=True)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, ".")  # with a folder as a member, and names that begin with ./
    ours, theirs = opened(tmp_path / "all.tar"), ImageFolder(folder, resolution=64)
    assert ours.contents == theirs.contents
    assert ours.captions == theirs.captions
    assert all(ours[n].image.tobytes() == theirs[n].image.tobytes() for n in range(len(ours)))


def test_nothing_hostile_is_used_and_all_of_it_is_counted(tmp_path: Path) -> None:
    link, hard, device = (tarfile.TarInfo(name) for name in ("link.png", "hard.png", "device.png"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    device.type = tarfile.CHRTYPE
    members = {
        "a.png": picture(), "../out.png": picture(), "/abs.png": picture(), "x/../../out.png": picture(),
        "a.pkl": pickle.dumps({}), "b.mask.png": picture(), "._a.png": b"x", "lonely.txt": "a caption",
    }  # fmt: skip
    write(tmp_path / "s/0.tar", members, link, hard, device)
    before = sorted(tmp_path.rglob("*"))
    pictures = opened(tmp_path / "s", prompt="a")
    assert pictures.ids == ["0.tar/a.png"]
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(pictures.ledger().skipped) == {
        "hidden files": 1, "links and other members that are no files": 3,
        "masks without an image": 1, "names that lead out of the shard": 3,
        "neither images nor captions: .pkl": 1,
    }  # fmt: skip
    assert pictures.ledger().adds_up()
    assert pictures.orphans == ["0.tar/lonely.txt"]
    assert any("names that lead out of the shard: 3" in line for line in pictures.notes())


def test_masks_are_those_of_the_same_files_in_a_folder(tmp_path: Path) -> None:
    clear, half = Image.new("RGBA", (80, 64), "red"), Image.new("L", (80, 64))
    clear.putalpha(half.point(lambda _: 7))
    half.paste(255, (0, 0, 40, 64))
    files = {
        "a.png": picture(), "a.mask.png": encoded(half), "deep/b.jpg": picture("blue", "jpg"),
        "deep/b-masklabel.png": encoded(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), "c.png": encoded(clear),
        "black.png": picture(), "black.mask.png": encoded(Image.new("L", (80, 64))),
        "broken.png": picture(), "broken.mask.png": b"no image", "-masklabel.png": picture(),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    shard = write(tmp_path / "0.tar", dict(sorted(files.items())))
    for masks in ("files", "files and alpha", "none"):
        theirs = ImageFolder(tmp_path / "folder", "x", resolution=64, masks=masks)
        ours = opened(shard, prompt="x", masks=masks)
        assert [name.removeprefix("0.tar/") for name in ours.ids] == theirs.ids
        assert (ours.masked, ours.companion_digests()) == (theirs.masked, theirs.companion_digests())
        for number in range(len(ours)):
            mine, other = ours.companion(number, "mask"), theirs.companion(number, "mask")
            assert (mine and mine.tobytes()) == (other and other.tobytes())
        assert ours.ledger() == theirs.ledger()
        assert ours.ledger().adds_up()
    assert [bad.path for bad in opened(shard, prompt="x").quarantined] == ["0.tar/black.png", "0.tar/broken.png"]
    assert "0.tar/broken.mask.png: not an image" in str(opened(shard, prompt="x").quarantined[1])


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ({"a.txt": b"\xff\xfe\xff"}, "a.txt: not UTF-8 at byte 0"),
        ({"a.json": "{"}, "a.json: Expecting property name"),
        ({"a.json": "[1]"}, "a.json: no JSON object"),
        ({"a.json": "[" * 100_000}, "a.json: maximum recursion depth exceeded"),
        ({"a.json": '{"caption": 5}'}, "a.json: the caption is 5, expected"),
        ({"a.txt": "x" * 1_000_001}, "a.txt: a caption of 1000001 bytes"),
    ],
)
def test_a_caption_that_cannot_be_read_costs_its_picture(
    tmp_path: Path, caption: Mapping[str, bytes | str], reason: str
) -> None:
    write(tmp_path / "0.tar", {"a.png": picture(), **caption, "b.png": picture(), "c.png": b"no image"})
    pictures = opened(tmp_path / "0.tar", prompt="a")
    assert pictures.ids == ["0.tar/b.png"]
    assert [str(bad).split(": ", 1)[0] for bad in pictures.quarantined] == ["0.tar/a.png", "0.tar/c.png"]
    assert reason in pictures.quarantined[0].reason
    assert pictures.ledger().adds_up()


@pytest.mark.parametrize("left", [0, 300, 600, 2000, -1024, -1])
def test_a_shard_that_is_cut_short_is_refused_by_name(tmp_path: Path, left: int) -> None:
    shard = write(tmp_path / "0.tar", {f"{n}.png": picture() for n in range(5)})
    content = shard.read_bytes()
    end = content.rstrip(b"\0")
    whole = content[: len(end) + -len(end) % 512 + 1024]  # without the padding of tarfile
    shard.write_bytes(whole)
    assert len(opened(shard, prompt="a")) == 5
    shard.write_bytes(whole[:left])
    with pytest.raises(DataError, match=r"0\.tar: not a whole tar file .*; fetch it again, or leave it out"):
        opened(shard, prompt="a")


def test_nothing_after_a_broken_header_is_lost_in_silence(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {f"{n}.png": picture() for n in range(5)})
    content = bytearray(shard.read_bytes())
    at = content.index(b"2.png")
    content[at : at + 5] = b"X.png"  # its sum of bytes does not fit any more
    shard.write_bytes(content)
    with pytest.raises(DataError, match="no header at byte"):
        opened(shard, prompt="a")
    write(shard, {"0.png": picture()})
    shard.write_bytes(shard.read_bytes() * 2)  # as cat puts two together
    with pytest.raises(DataError, match="no header at byte"):
        opened(shard, prompt="a")


def test_a_member_of_negative_size_is_no_endless_loop(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {"0.png": picture(), "1.png": picture()})
    content = bytearray(shard.read_bytes())
    at = content.index(b"1.png")
    content[at + 124 : at + 136] = (-at - 512).to_bytes(12, "big", signed=True)  # back to the first
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"0\.tar: not a whole tar file"):
        opened(shard, prompt="a")


def test_whatever_is_broken_in_a_shard_is_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "0.tar", {"a" * 150 + ".png": picture(), "b.png": picture(), "b.txt": "x"}).read_bytes()
    source = random.Random(0)
    for number in range(300):
        content = bytearray(whole)
        for _ in range(source.randrange(1, 4)):
            content[source.randrange(len(whole.rstrip(b"\0")))] = source.randrange(256)
        shard = tmp_path / f"{number}.tar"
        shard.write_bytes(content)
        try:
            assert opened(shard, prompt="a").ledger().adds_up()
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_compressed_shards_are_refused_and_those_beside_pictures_left_aside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"0\.tar: not a whole tar file"):
        opened(tmp_path / "0.tar")
    write(tmp_path / "0.tar", {"a.txt": "no image"})
    with pytest.raises(DataError, match=r"no image found in 0\.tar"):
        opened(tmp_path / "0.tar")
    write(tmp_path / "0.tar", {"a.png": picture()})
    (tmp_path / "b.png").write_bytes(picture())
    folder = open_dataset(str(tmp_path), "a", resolution=64)  # with a backup, say, of its pictures
    assert folder.ids == ["b.png"]
    assert folder.ledger().skipped == {"neither images nor captions: .tar": 1}


def test_an_unchanged_shard_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"a.png": picture(), "b.png": picture("blue"), "b.json": '{"caption": ["x", "y"]}', "x\udce9.md": "x"}
    shard = write(tmp_path / "0.tar", members)
    first = opened(shard, prompt="a", memory=ImageIndex(tmp_path / "cache"))
    read: list[object] = []
    from finetune.data import image_checks

    plainly = image_checks.read_file
    monkeypatch.setattr(image_checks, "read_file", lambda source: read.append(source) or plainly(source))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        again = opened(shard, prompt="a", memory=ImageIndex(tmp_path / "cache"))
    assert (again.ids, again.captions, again.contents) == (first.ids, first.captions, first.contents)
    assert again.ledger() == first.ledger()
    assert not read
    opened(shard, prompt="a", memory=ImageIndex(tmp_path / "cache", strict=True))
    assert len(read) == 2
    read.clear()
    write(shard, members | {"a.png": picture("green")})
    changed = opened(shard, prompt="a", memory=ImageIndex(tmp_path / "cache"))
    assert len(read) >= 2
    assert [a == b for a, b in zip(first.contents, changed.contents, strict=True)] == [False, True]
    with pytest.raises(DataError, match=r"0\.tar/a\.png: the file has changed since the start"):
        first[0]


def test_a_part_reads_what_is_remembered_of_its_own_pictures_alone(tmp_path: Path) -> None:
    for shard in range(3):
        members = {f"{shard}{number}.png": picture(("red", "blue", "lime")[number % 3]) for number in range(5)}
        texts = {f"{shard}{number}.txt": f"caption {shard} {number}" for number in range(5)}
        mask = encoded(Image.new("L", (80, 64), 99))
        write(tmp_path / f"s/{shard}.tar", members | texts | {f"{shard}1.mask.png": mask, "lonely.txt": "of none"})
    shards = sorted((tmp_path / "s").glob("*.tar"))
    memory = ImageIndex(tmp_path / "memory")
    whole = TarShards(shards, tmp_path / "s", resolution=64, memory=memory)
    assert len(whole) == 15
    numbers = [1, 6, 8, 14]
    with sqlite3.connect(tmp_path / "memory/pictures.sqlite3") as base:  # what the others hold is not needed
        wanted = " OR ".join(
            f"(number = {number % 5} AND CAST(shard AS TEXT) LIKE '%{number // 5}.tar')" for number in numbers
        )
        base.execute(f"DELETE FROM shard_pictures WHERE NOT ({wanted})")
    part = TarShards(shards, tmp_path / "s", resolution=64, memory=ImageIndex(tmp_path / "memory"), part=numbers)
    assert list(part.ids) == [whole.ids[number] for number in numbers]
    assert list(part.captions) == ["caption 0 1", "caption 1 1", "caption 1 3", "caption 2 4"]
    assert part.ledger().masks == 2
    assert part.ledger().captions == 0  # those are accounted for with the first part


def test_captions_from_names_or_the_prompt_alone(tmp_path: Path) -> None:
    write(tmp_path / "s/0.tar", {"a_dog_2.png": picture(), "a_dog_2.txt": "from txt"})
    assert opened(tmp_path / "s", caption_source="filename").captions == ["a dog"]
    assert opened(tmp_path / "s", prompt="a cat", caption_source="prompt").captions == ["a cat"]

"""The wall of images over HTTP."""

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from finetune.data.images import open_mask
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.app import Page, build
from finetune.page.image_set import LEFT_OUT

JSON = {"accept": "application/json"}


@pytest.fixture
def folder(tmp_path: Path, make_pictures: Callable[..., Path]) -> Path:
    folder = make_pictures(tmp_path / "data/pics", count=5, captions=True)
    (folder / "03.txt").unlink()
    (folder / "04.txt").write_bytes(b"caf\xe9 and more text")
    Image.new("L", (80, 64), 255).save(folder / "00.mask.png")
    return folder


@pytest.fixture
def client(folder: Path) -> TestClient:
    return TestClient(build(Page(AllowedPaths([folder.parent], folder.parent.parent))), headers=JSON)


def tiles(client: TestClient, folder: Path, **fields: str) -> list[str]:
    answer = client.get("/images/tiles", params={"folder": str(folder), **fields}).json()
    assert answer["total"] >= len(answer["tiles"])
    return [tile["name"] for tile in answer["tiles"]]


def test_the_wall_shows_what_training_would_read(client: TestClient, folder: Path) -> None:
    assert str(folder) in client.get("/images").text
    assert "5 images, 2 without a caption, 0 left out" in client.get("/images/wall", params={"folder": folder}).text
    answer = client.get("/images/tiles", params={"folder": str(folder)}).json()
    first, unreadable = answer["tiles"][0], answer["tiles"][4]
    assert (first["name"], first["caption"], first["mask"]) == ("00.png", "a red disc, number 0", "00.mask.png")
    assert "04.txt is not UTF-8" in unreadable["problem"]
    assert tiles(client, folder, first="1", count="2") == ["01.png", "02.png"]
    assert tiles(client, folder, find="NUMBER 2") == ["02.png"]
    assert tiles(client, folder, find="tag:number 1") == ["01.png"]
    assert tiles(client, folder, show="without caption") == ["03.png", "04.png"]
    assert tiles(client, folder, show="masked") == ["00.png"]
    tags = client.get("/images/tags", params={"folder": str(folder)}).json()["tags"]
    assert tags[0] == ["a red disc", 3]


def test_images_and_thumbnails_are_upright(client: TestClient, folder: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # on its side
    Image.new("RGB", (800, 400), "red").save(folder / "turned.jpg", exif=exif)
    asked = {"folder": str(folder), "name": "turned.jpg"}
    client.get("/images/wall", params=asked)
    small = client.get("/images/file", params=asked | {"small": ""})
    assert Image.open(io.BytesIO(small.content)).size == (160, 320)
    assert client.get("/images/file", params=asked).content == (folder / "turned.jpg").read_bytes()
    seen = client.get("/images/caption", params=asked).json()["seen"]
    assert (seen["size"], seen["bucket"]) == ([400, 800], [320, 704])
    assert seen["shares"] == pytest.approx([320 / 704 / (400 / 800), 1])


def test_a_caption_is_edited_and_a_conflict_loses_nothing(client: TestClient, folder: Path) -> None:
    asked = {"folder": str(folder), "name": "01.png"}
    opened = client.get("/images/caption", params=asked).json()
    edit = asked | {"text": "a <b>blue</b> disc", "version": opened["version"]}
    assert client.post("/images/caption", data=edit).json()["tile"]["caption"] == "a <b>blue</b> disc"
    assert (folder / "01.txt").read_text() == "a <b>blue</b> disc"
    conflict = client.post("/images/caption", data=edit | {"text": "of another tab"})
    assert (conflict.status_code, conflict.json()["text"]) == (409, "a <b>blue</b> disc")
    assert "another program or tab" in conflict.json()["error"]
    mine = edit | {"text": "of another tab", "version": conflict.json()["version"]}
    assert client.post("/images/caption", data=mine).status_code == 200
    assert tiles(client, folder, find="another tab") == ["01.png"]


def test_a_caption_that_is_emptied_shows_what_the_metadata_say(client: TestClient, folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\n01.png,from the table\n")
    client.get("/images/wall", params={"folder": str(folder)})
    asked = {"folder": str(folder), "name": "01.png"}
    version = client.get("/images/caption", params=asked).json()["version"]
    tile = client.post("/images/caption", data=asked | {"text": "", "version": version}).json()["tile"]
    assert (tile["caption"], tile["source"]) == ("from the table", "metadata")
    assert client.get("/images/caption", params=asked).json()["text"] == "from the table"


def test_tags_of_those_that_are_shown_are_edited_and_undone(client: TestClient, folder: Path) -> None:
    (folder / "04.txt").unlink()
    client.get("/images/wall", params={"folder": str(folder)})
    fields = {"folder": str(folder), "find": "number", "action": "replace", "tag": "a red disc", "new": "a ball"}
    assert client.post("/images/tags", data=fields).json() == {"changed": 3, "of": 3}
    assert (folder / "02.txt").read_text() == "a ball, number 2"
    assert tiles(client, folder, find="tag:a ball") == ["00.png", "01.png", "02.png"]
    assert client.post("/images/undo", data=fields).json() == {"changed": 3}
    assert (folder / "02.txt").read_text() == "a red disc, number 2"
    assert client.post("/images/tags", data=fields | {"action": "delete"}).status_code == 400


def test_an_image_is_left_out_and_put_back_with_its_files(client: TestClient, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fields = {"folder": str(folder), "name": "00.png"}
    client.post("/images/leave-out", data=fields)
    assert tiles(client, folder) == ["01.png", "02.png", "03.png", "04.png"]
    assert sorted(path.name for path in (folder / LEFT_OUT).iterdir()) == ["00.mask.png", "00.png", "00.txt"]
    assert tiles(client, folder, show="left out") == [f"{LEFT_OUT}/00.png"]
    asked = fields | {"name": f"{LEFT_OUT}/00.png"}
    assert client.get("/images/file", params=asked).status_code == 200
    client.post("/images/put-back", data=asked)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert tiles(client, folder)[0] == "00.png"
    assert "it was not left out" in client.post("/images/put-back", data=asked).json()["error"]


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "link.png", "00.txt", "../x.mask.png", ""])
def test_nothing_but_the_images_of_the_folder_is_shown(client: TestClient, folder: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(folder.parent.parent / "secret.png")
    Image.new("RGB", (8, 8)).save(folder.parent / "x.mask.png")
    (folder / "link.png").symlink_to(folder.parent.parent / "secret.png")
    client.get("/images/wall", params={"folder": str(folder)})
    for path in ("/images/file", "/images/caption"):
        answer = client.get(path, params={"folder": str(folder), "name": name})
        assert (answer.status_code, "no image in" in answer.json()["error"]) == (400, True)


def test_links_out_of_the_folder_show_no_text_and_no_image(client: TestClient, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    (outside / "secret.txt").write_text("a secret")
    (folder / "linked").symlink_to(outside)
    (folder / "03.txt").symlink_to(outside / "secret.txt")
    (folder / LEFT_OUT).symlink_to(outside)
    client.get("/images/wall", params={"folder": str(folder)})
    assert tiles(client, folder, find="secret") == []
    assert tiles(client, folder, show="left out") == []
    assert tiles(client, folder, show="without caption") == ["03.png", "04.png"]
    fields = {"folder": str(folder), "name": "00.png"}
    assert "a link out" in client.post("/images/leave-out", data=fields).json()["error"]
    assert client.post("/images/check", data=fields).json()["images"] == 5
    client.post("/images/mask", data=fields)  # reads the folder of the image again
    assert tiles(client, folder, find="secret") == []


@pytest.mark.parametrize("path", ["/images/wall", "/images/tiles", "/images/tags"])
def test_folders_that_are_not_open_or_gone_are_refused(client: TestClient, folder: Path, path: str) -> None:
    for given in ("/etc", str(folder / ".."), str(folder.parent / "gone"), ""):
        expected = 200 if given.endswith("..") else 400  # it is the open folder itself
        assert client.get(path, params={"folder": given}).status_code == expected
    assert "choose one of" in client.get("/images/tiles", params={"folder": str(folder), "show": "x"}).json()["error"]
    assert "whole number" in client.get("/images/tiles", params={"folder": str(folder), "first": "-1"}).json()["error"]


def test_a_folder_without_images_says_so(client: TestClient, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    assert "This folder has no images" in client.get("/images/wall", params={"folder": folder.parent / "empty"}).text


def test_a_check_names_the_images_worth_a_look(client: TestClient, folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "00.png").read_bytes()[:60])
    shutil.copy(folder / "01.png", folder / "twin.png")
    client.get("/images/wall", params={"folder": str(folder)})
    fields = {"folder": str(folder), "resolution": "512"}
    found = client.post("/images/check", data=fields).json()
    assert found["images"] == 7
    assert "6 small, 3 copy, 1 caption, 1 unreadable" in found["text"]
    assert len(tiles(client, folder, show="problems")) == 7
    answer = client.get("/images/tiles", params={"folder": str(folder), "find": "twin"}).json()
    assert "the same file as 01.png" in answer["tiles"][0]["problem"]
    assert "choose one of" in client.post("/images/check", data=fields | {"resolution": "5"}).json()["error"]


def png(mode: str, size: tuple[int, int], colour: int | str) -> str:
    Image.new(mode, size, colour).save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_mask_is_painted_replaced_and_deleted_and_the_one_before_is_kept(client: TestClient, folder: Path) -> None:
    fields = {"folder": str(folder), "name": "01.png"}  # 64 x 96
    painted = client.post("/images/mask", data=fields | {"png": png("RGBA", (32, 48), "white")}).json()
    assert painted["tile"]["mask"] == "01.mask.png"
    assert open_mask(folder / "01.mask.png").getextrema() == (255, 255)
    assert tiles(client, folder, show="masked") == ["00.png", "01.png"]
    client.post("/images/mask", data=fields | {"png": png("L", (64, 96), 9)})
    assert open_mask(folder / "01.mask.png").getextrema() == (9, 9)
    assert open_mask(folder / ".01.mask.png.before").getextrema() == (255, 255)
    assert client.post("/images/mask", data=fields).json()["tile"]["mask"] == ""
    assert not (folder / "01.mask.png").exists()
    assert open_mask(folder / ".01.mask.png.before").getextrema() == (9, 9)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (png("L", (96, 64), 255), "of another shape"),
        (png("L", (64, 96), 0), "paint what counts"),
        (base64.b64encode(b"GIF89a").decode(), "not a PNG"),
        ("%%%", "not base64"),
    ],
)
def test_a_mask_that_training_would_refuse_is_not_written(
    client: TestClient, folder: Path, given: str, why: str
) -> None:
    answer = client.post("/images/mask", data={"folder": str(folder), "name": "01.png", "png": given})
    assert (answer.status_code, why in answer.json()["error"]) == (400, True)
    assert not (folder / "01.mask.png").exists()

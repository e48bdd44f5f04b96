import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import Table, parquet

from finetune.data.captions import (
    TRIGGER,
    Caption,
    caption_of_name,
    find_captions,
    first_caption,
    placed_trigger,
    with_trigger,
)
from finetune.data.listing import is_picture, list_files
from finetune.errors import DataError


def make(folder: Path, **files: str) -> list[str]:
    """Write files by name (__ for a slash, _DOT_ for a dot) and return the pictures among them."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return pictures_in(folder)


def pictures_in(folder: Path) -> list[str]:
    return [file for file in list_files(folder) if is_picture(file)]


def captions(folder: Path, prompt: str | None = None) -> dict[str, Caption]:
    pictures = pictures_in(folder)
    return dict(
        zip(pictures, find_captions(folder, list_files(folder), pictures=pictures, prompt=prompt).captions, strict=True)
    )


def write_rows(path: Path, *rows: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_precedence_is_txt_then_caption_then_metadata_then_prompt(tmp_path: Path):
    make(tmp_path, a_DOT_png="", b_DOT_png="", c_DOT_png="", d_DOT_png="")
    make(tmp_path, a_DOT_txt="from txt", a_DOT_caption="no", b_DOT_caption="from caption")
    write_rows(tmp_path / "metadata.jsonl", *({"file_name": f"{x}.png", "text": "from metadata"} for x in "abc"))
    assert captions(tmp_path, "the prompt") == {
        "a.png": Caption("from txt", "txt"),
        "b.png": Caption("from caption", "caption"),
        "c.png": Caption("from metadata", "metadata"),
        "d.png": Caption("the prompt", "prompt"),
    }


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a dog.jpg", "a dog"),
        ("dogs/a_dog_on_grass_12.jpg", "a dog on grass"),
        ("a dog (2).png", "a dog"),
        ("dog 3.png", "dog 3"),
        ("v1.5 test.webp", "v1.5 test"),
        ("_7.jpg", ""),
    ],
)
def test_the_name_of_an_image_as_its_caption(name: str, caption: str):
    assert caption_of_name(name) == caption


def test_names_and_the_prompt_take_the_place_of_caption_files_and_say_so(tmp_path: Path):
    make(tmp_path, a_red_dog_1_DOT_png="", a_red_dog_1_DOT_txt="from txt", _5_DOT_png="")
    files, pictures = list_files(tmp_path), pictures_in(tmp_path)
    found = find_captions(tmp_path, files, pictures, "the prompt", source="filename")
    assert dict(zip(pictures, found.captions, strict=True)) == {
        "_5.png": Caption("the prompt", "prompt"),
        "a_red_dog_1.png": Caption("a red dog", "filename"),
    }
    assert found.passed_over == ["1 caption file (caption_source is filename)"]
    alike = find_captions(tmp_path, files, pictures, "the prompt", source="prompt")
    assert alike.captions == [Caption("the prompt", "prompt")] * 2


def test_without_caption_or_prompt_the_text_is_empty(tmp_path: Path):
    make(tmp_path, a_DOT_png="")
    assert captions(tmp_path) == {"a.png": Caption("", "none")}


def test_empty_files_and_rows_count_as_no_caption(tmp_path: Path):
    make(tmp_path, a_DOT_png="", a_DOT_txt=" \n ", a_DOT_caption="own", b_DOT_png="", b_DOT_txt="", c_DOT_png="")
    write_rows(tmp_path / "metadata.jsonl", {"file_name": "b.png", "text": ""}, {"file_name": "c.png"})
    assert captions(tmp_path, "p") == {
        "a.png": Caption("own", "caption"),
        "b.png": Caption("p", "prompt"),
        "c.png": Caption("p", "prompt"),
    }


def test_line_breaks_become_single_spaces():
    assert first_caption([("txt", "a dog,\r\n  on  grass \n\n")]).text == "a dog, on  grass"


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path):
    make(tmp_path, a_DOT_png="")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfa dog")
    assert captions(tmp_path)["a.png"] == Caption("a dog", "txt")


def test_pictures_with_the_same_stem_share_it_only_in_the_same_folder(tmp_path: Path):
    make(tmp_path, a_DOT_b_DOT_png="", a_DOT_b_DOT_jpg="", sub__a_DOT_b_DOT_jpg="", a_DOT_b_DOT_txt="dog")
    assert {name: caption.text for name, caption in captions(tmp_path).items()} == {
        "a.b.jpg": "dog",
        "a.b.png": "dog",
        "sub/a.b.jpg": "",
    }


def test_caption_files_without_a_picture_are_listed(tmp_path: Path):
    pictures = make(tmp_path, a_DOT_png="", a_DOT_txt="dog", README_DOT_txt="", sub__old_DOT_caption="cat")
    found = find_captions(tmp_path, list_files(tmp_path), pictures=pictures)
    assert found.orphans == ["README.txt", "sub/old.caption"]
    assert found.files == 1


@pytest.mark.parametrize("given", ["sub/../sub", "."], ids=["dots", "plain"])
def test_metadata_names_files_relative_to_itself_and_the_nearest_wins(tmp_path: Path, given: str):
    make(tmp_path, sub__a_DOT_png="", sub__b_DOT_png="")
    write_rows(tmp_path / "metadata.jsonl", *({"file_name": f"./sub/{x}.png", "text": "far"} for x in "ab"))
    (tmp_path / "sub" / "metadata.csv").write_text('text,file_name\n"near, and quoted\nin two lines",a.png\n')
    folder = tmp_path / given / ".." if given != "." else tmp_path
    found = captions(folder)
    assert [caption.text for caption in found.values()] == ["near, and quoted in two lines", "far"]


def test_an_empty_row_leaves_the_caption_of_the_metadata_further_up(tmp_path: Path):
    make(tmp_path, sub__a_DOT_png="")
    write_rows(tmp_path / "metadata.jsonl", {"file_name": "sub/a.png", "text": "far"})
    write_rows(tmp_path / "sub" / "metadata.jsonl", {"file_name": "a.png", "text": ""})
    assert captions(tmp_path)["sub/a.png"] == Caption("far", "metadata")


def test_jsonl_wins_over_csv_in_the_same_folder(tmp_path: Path):
    make(tmp_path, a_DOT_png="", metadata_DOT_csv="file_name,text\na.png,from csv\n")
    write_rows(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "from jsonl"})
    assert captions(tmp_path)["a.png"].text == "from jsonl"


def test_parquet_wins_over_both_and_has_the_same_rules(tmp_path: Path):
    make(tmp_path, a_DOT_png="", metadata_DOT_csv="file_name,text\na.png,from csv\n")
    write_rows(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "from jsonl"})
    table = tmp_path / "metadata.parquet"
    parquet.write_table(Table.from_pylist([{"file_name": "a.png", "text": ["one", "two"]}]), table)
    assert captions(tmp_path)["a.png"] == Caption("one", "metadata", ("two",))
    parquet.write_table(Table.from_pylist([{"file_name": "a.png", "text": "x"}, {"file_name": "b.png"}]), table)
    with pytest.raises(DataError, match=r"metadata.parquet, line 2: b.png does not exist"):
        captions(tmp_path)
    parquet.write_table(Table.from_pylist([{"file_name": "a.png", "caption": "x"}]), table)
    with pytest.raises(DataError, match=r"metadata.parquet, line 1: captions belong in the column text, not caption"):
        captions(tmp_path)
    table.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"metadata.parquet: not Parquet"):
        captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}\n\n{"file_name": "b.png"}', "line 3: b.png does not exist"),
        ("metadata.jsonl", '{"file_name": "notes.md"}', "line 1: notes.md is not an image in a supported format"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": "./a.png"}', "line 2: ./a.png was named before"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file', "line 2: not JSON"),
        ("metadata.jsonl", '["a.png"]', "line 1: no file_name"),
        ("metadata.jsonl", '{"image": "a.png"}', "line 1: no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', "line 1: text is 3"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "caption": "x"}',
            "line 1: captions belong in the column text, not caption",
        ),
        ("metadata.csv", "file_name,caption\na.png,x\n", "line 1: captions belong in the column text, not caption"),
        ("metadata.csv", "file_name,text\na.png,x\nb.png,y\n", "line 3: b.png does not exist"),
        ("metadata.csv", "image,text\na.png,x\n", "line 1: no column file_name among: image, text"),
        ("metadata.csv", "", "line 1: no column file_name"),
        ("metadata.csv", "file_name,text\na.png,a dog, on grass\n", "line 2: more fields than columns"),
        ("metadata.csv", "file_name,text\n,a dog\n", "line 2: file_name is empty"),
        ("metadata.csv", 'file_name,text\na.png,"a dog\n', "line 2: not CSV"),
    ],
)
def test_malformed_metadata_names_file_and_line(tmp_path: Path, name: str, content: str, message: str):
    make(tmp_path, a_DOT_png="", notes_DOT_md="")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        captions(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}, {message}")
    assert "\n" not in str(caught.value)


def test_caption_files_that_are_not_utf8_are_named_with_their_pictures(tmp_path: Path):
    make(tmp_path, a_DOT_png="", sub__b_DOT_png="", c_DOT_png="", c_DOT_txt="fine")
    for name in ("a.txt", "sub/b.caption"):
        (tmp_path / name).write_bytes("un café".encode("latin-1"))
    found = find_captions(tmp_path, list_files(tmp_path), pictures=pictures_in(tmp_path), prompt="a prompt")
    assert found.unreadable == {
        "a.png": "a.txt is not UTF-8 at byte 6; save it as UTF-8",
        "sub/b.png": "b.caption is not UTF-8 at byte 6; save it as UTF-8",
    }


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
def test_a_byte_order_mark_says_how_a_file_is_read(tmp_path: Path, encoding: str):
    make(tmp_path, a_DOT_png="")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.txt").write_bytes((mark + "un café").encode(encoding))
    assert captions(tmp_path) == {"a.png": Caption("un café", "txt")}


def test_empty_caption_files_are_named(tmp_path: Path):
    pictures = make(tmp_path, a_DOT_png="", a_DOT_txt=" \n", b_DOT_png="", b_DOT_txt="b", c_DOT_txt="")
    found = find_captions(tmp_path, list_files(tmp_path), pictures=pictures, prompt="the prompt")
    assert [caption.text for caption in found.captions] == ["the prompt", "b"]
    assert (found.empty, found.orphans) == (["a.txt"], ["c.txt"])


@pytest.mark.parametrize(
    ("caption", "placed"),
    [
        ("a photo of a dog", "a photo of [trigger] dog"),
        ("an image of the dog of my aunt", "an image of [trigger] dog of my aunt"),
        ("dog, grass", None),
        ("a dog", None),
    ],
)
def test_where_the_trigger_would_read_well(caption: str, placed: str | None):
    assert placed_trigger(caption) == placed


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_what_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path, name: str):
    make(tmp_path, a_DOT_png="")
    (tmp_path / name).write_bytes("un café".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 at byte 6; save it as UTF-8$") as caught:
        captions(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of [trigger]", "a photo of sks"),
        ("[trigger] and [trigger]", "sks and sks"),
        ("a photo", "sks a photo"),
        ("", "sks"),
        ("a photo of sks", "a photo of sks"),
        ("sks, sitting", "sks, sitting"),
        ("risks and asks", "sks risks and asks"),
    ],
)
def test_trigger_replaces_or_leads(caption: str, expected: str):
    assert with_trigger(caption, "sks") == expected


@pytest.mark.parametrize("trigger", [None, ""])
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo", "a photo"),
        ("- as it is, ", "- as it is, "),
        ("[trigger], a photo", "a photo"),
        ("[trigger] dog", "dog"),
        ("[trigger]: a dog", "a dog"),
        ("a [trigger] dog", "a dog"),
        ("a photo of [trigger], outside", "a photo of, outside"),
        ("tall, [trigger], red", "tall, red"),
        ("tall, [trigger]", "tall"),
        ("a photo of [trigger]", "a photo of"),
        ("[trigger]", ""),
    ],
)
def test_without_a_trigger_word_its_place_closes(caption: str, expected: str, trigger: str | None):
    assert with_trigger(caption, trigger) == expected


@given(st.text(alphabet="ab ,;.[]", max_size=8), st.text(alphabet="ab ,;.[]", max_size=8))
def test_without_a_trigger_word_no_placeholder_is_left(before: str, after: str):
    result = with_trigger(f"{before}{TRIGGER}{after}", None)
    assert TRIGGER not in result
    assert not result.startswith((" ", ","))
    letters = [letter for letter in before + after if letter in "ab"]
    assert [letter for letter in result if letter in "ab"] == letters


def test_names_meet_whether_they_are_composed_or_not(tmp_path: Path) -> None:
    """macOS writes é as e with an accent of its own."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for name in (f"{apart}.png", f"1/{composed}.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / f"{composed}.txt").write_text("a cup")
    (tmp_path / "1/metadata.jsonl").write_text(json.dumps({"file_name": f"{apart}.png", "text": "another"}))
    files = list_files(tmp_path)
    found = find_captions(tmp_path, files, pictures=[file for file in files if file.endswith(".png")])
    assert sorted(caption.text for caption in found.captions) == ["a cup", "another"]
    assert found.orphans == []


def test_utf16_without_a_mark_is_seen(tmp_path: Path) -> None:
    pictures = []
    for number, encoding in enumerate(("utf-16-le", "utf-16-be", "utf-8")):
        pictures.append(f"{number}.png")
        (tmp_path / f"{number}.txt").write_bytes("a dog".encode(encoding))
    assert [c.text for c in find_captions(tmp_path, list_files(tmp_path), pictures=pictures).captions] == ["a dog"] * 3


def test_metadata_with_backslashes_and_another_column_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").touch()
    (tmp_path / "metadata.csv").write_text("file_name,mood\nin\\a.png,merry\n")
    files = list_files(tmp_path)
    found = find_captions(tmp_path, files, pictures=["in/a.png"], column="mood")
    assert (found.captions[0].text, found.passed_over) == ("merry", [])
    found = find_captions(tmp_path, files, pictures=["in/a.png"])
    assert found.captions[0].source == "none"
    assert found.passed_over == ["metadata.csv: mood (--caption_column takes another one than text)"]


def test_what_looks_like_captions_and_is_not_read_is_named(tmp_path: Path) -> None:
    pictures = ["Photo.png", "b.png"]
    for name in (*pictures, "photo.txt", "b.tags", "b.png.txt", "metadata.json", "b.npz", "notes.pdf"):
        (tmp_path / name).touch()
    (tmp_path / "photo.txt").write_text("a dog")
    found = find_captions(tmp_path, list_files(tmp_path), pictures=pictures)
    assert sorted(found.passed_over) == [
        "b.png.txt",
        "b.tags",
        "metadata.json",
        "photo.txt (in other letters than its image)",
    ]

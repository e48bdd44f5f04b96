import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from finetune.data.image_checks import RejectedImage, check_images
from finetune.data.images import digest_of, open_image, to_rgb
from finetune.data.listing import is_picture, list_files
from finetune.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
UPRIGHT = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (9, 8, 7)]], dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_finds_pictures_at_any_depth_in_the_order_of_relative_posix_paths(tmp_path: Path):
    names = ["b.PNG", "a/z.jpeg", "a.jpg", "a/b/c.webp", "a-b/x.tif", "x.bmp", "y.gif", "z.avif", "q.tiff", "r.jpg"]
    others = [".hidden.png", ".git/x.png", "a/.thumbs/x.png", "notes.txt", "a/jpg", "model.safetensors"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [name for name in list_files(tmp_path) if is_picture(name)] == sorted(names)


def test_pictures_that_cannot_be_read_here_are_found_so_that_they_are_reported(tmp_path: Path):
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    found = list_files(tmp_path)
    assert found == ["phone.HEIC"]
    assert is_picture(found[0])
    assert check_images(found, lambda _: tmp_path / found[0]) == [
        RejectedImage("phone.HEIC", "HEIC is read with pip install pillow-heif; or convert it: magick a.heic a.png")
    ]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a.png").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "circle").symlink_to(folder)
    (folder / "dangling.png").symlink_to(tmp_path / "nothing")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    assert list_files(folder) == ["dangling.png", "itself.png", "linked/a.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: No such file or directory$"):
        list_files(tmp_path / "nowhere")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_turned_exactly(orientation: int, tmp_path: Path):
    stored = {  # what a camera held that way writes: the inverse of what the viewer has to do
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: UPRIGHT.transpose(1, 0, 2),
        6: np.rot90(UPRIGHT, 1),
        7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(UPRIGHT, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert pixels(open_image(tmp_path / "a.png")) == UPRIGHT.tolist()


def test_a_broken_exif_block_leaves_the_pixels_as_stored():
    data = encoded(Image.fromarray(UPRIGHT), "PNG", exif=b"Exif\0\0garbage")
    assert pixels(open_image(io.BytesIO(data))) == UPRIGHT.tolist()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str):
    grey = np.array([[0, 128, 129, 257, 256 * 128, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(grey), format)
    assert pixels(open_image(io.BytesIO(data))) == [[[v] * 3 for v in (0, 0, 1, 1, 128, 255)]]


def test_16_bit_grey_with_a_transparent_value_is_white_there():
    image = Image.fromarray(np.array([[0, 257, 512]], dtype=np.uint16))
    data = encoded(image, "PNG", transparency=257)
    assert pixels(open_image(io.BytesIO(data))) == [[[0] * 3, [255] * 3, [2] * 3]]


@pytest.mark.parametrize(
    "values", [np.array([[0.5, 1.0]], dtype=np.float32), np.array([[0, 70000]], dtype=np.int32)], ids=["F", "I"]
)
def test_pixels_of_unknown_range_are_refused(values: np.ndarray):
    with pytest.raises(ValueError, match="with no known range"):
        to_rgb(Image.fromarray(values))


def test_alpha_is_composed_over_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    opened = open_image(io.BytesIO(encoded(image, "PNG")))
    assert pixels(opened) == [[[255, 255, 255], [255, 127, 127], [255, 0, 0]]]


@pytest.mark.parametrize("background", ["blue", "#0000ff"])
def test_alpha_is_composed_over_a_background_that_is_chosen(background: str):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (255, 0, 0, alpha))
    opened = open_image(io.BytesIO(encoded(image, "PNG")), background=background)
    assert pixels(opened) == [[[0, 0, 255], [128, 0, 127], [255, 0, 0]]]
    deep = encoded(Image.fromarray(np.array([[0, 257, 512]], dtype=np.uint16)), "PNG", transparency=257)
    assert pixels(open_image(io.BytesIO(deep), background=background)) == [[[0] * 3, [0, 0, 255], [2] * 3]]


def test_grey_with_alpha_is_composed_over_white():
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (40, 255))
    assert pixels(open_image(io.BytesIO(encoded(image, "PNG")))) == [[[255] * 3, [40] * 3]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["one colour", "alpha per colour"])
def test_palette_transparency_is_composed_over_white(transparency: int | bytes):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    data = encoded(image, "PNG", transparency=transparency)
    assert pixels(open_image(io.BytesIO(data))) == [[list(RED), list(WHITE)]]


def test_an_opaque_palette_becomes_its_colours():
    image = Image.new("P", (2, 1), 1)
    image.putpalette([*RED, *BLUE])
    assert pixels(open_image(io.BytesIO(encoded(image, "BMP")))) == [[list(BLUE)] * 2]


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (2, 2), color) for color in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(open_image(io.BytesIO(data))) == [[list(RED)] * 2] * 2


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")
    assert pixels(open_image(io.BytesIO(data))) == [[list(RED)]]


def test_black_and_white_becomes_rgb():
    assert pixels(to_rgb(Image.new("1", (1, 1), 1))) == [[list(WHITE)]]


def broken_files() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    bomb = bytearray(encoded(noise, "BMP"))
    bomb[18:26] = (20000).to_bytes(4, "little") * 2  # width and height in the header
    eps = encoded(noise, "EPS")
    return {
        "empty": (b"", "the file is empty"),
        "text": (b"<html>404</html>", "not an image in a supported format"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated|broken data stream"),
        "head.png": (png[:20], "Truncated File Read"),
        "bomb.bmp": (bytes(bomb), "more than 178,956,970 pixels; make it smaller"),
        "postscript.jpg": (eps, "not an image in a supported format"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_what_is_no_picture_raises_one_line_with_path_and_reason(name: str, tmp_path: Path):
    data, reason = broken_files()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        open_image(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert message.count(str(tmp_path)) == 1
    assert "\n" not in message


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="not a regular file"):
        open_image(tmp_path / "a.png")


def test_a_missing_file_is_named_as_it_was_asked_for(tmp_path: Path):
    with pytest.raises(DataError, match=r"^row 3: No such file or directory$"):
        open_image(tmp_path / "a.png", "row 3")


def test_check_gives_upright_sizes_and_reasons_in_order(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "b.png").touch()
    Image.new("RGB", (5, 2)).save(tmp_path / "c.png")
    Image.new("RGB", (101, 2)).save(tmp_path / "d.png")
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]

    def source(position: int) -> Path:
        if names[position] == "e.png":
            raise ValueError("not there")
        return tmp_path / names[position]

    assert [getattr(found, "size", found) for found in check_images(names, source)] == [
        (3, 4),
        RejectedImage("b.png", "the file is empty"),
        (5, 2),
        RejectedImage("d.png", "101 x 2 pixels: one side is over 50 times the other"),
        RejectedImage("e.png", "not there"),
    ]
    assert str(RejectedImage("b.png", "the file is empty")) == "b.png: the file is empty"


def photograph(mode: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(noise).resize((300, 203), Image.Resampling.BICUBIC).convert(mode)


def size_or_reason(content: bytes) -> tuple[int, int] | str:
    try:
        return open_image(io.BytesIO(content), "a").size
    except DataError as error:
        return str(error).removeprefix("a: ")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_check_says_of_a_jpeg_what_decoding_all_of_it_does(mode: str, progressive: bool) -> None:
    def jpeg(orientation: int) -> bytes:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        return encoded(photograph(mode), "JPEG", progressive=progressive, exif=exif)

    turned, content = [jpeg(orientation) for orientation in range(1, 9)], jpeg(6)
    lengths = [*range(1, len(content), len(content) // 40), *range(len(content) - 40, len(content))]
    contents = turned + [content[:length] for length in lengths]
    found = check_images([str(number) for number in range(len(contents))], lambda place: io.BytesIO(contents[place]))
    told = [verdict.reason if isinstance(verdict, RejectedImage) else verdict.size for verdict in found]
    assert told == list(map(size_or_reason, contents))
    assert sum(isinstance(verdict, RejectedImage) for verdict in found) > 40


@pytest.mark.skipif(os.name != "posix", reason="names that are not Unicode exist on POSIX systems")
def test_a_name_that_is_not_utf8_can_be_found_and_opened(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    try:
        Image.new("RGB", (2, 1), RED).save(path)
    except OSError:
        pytest.skip("this file system allows no such name")
    assert list_files(tmp_path) == [path.name]
    assert pixels(open_image(path)) == [[list(RED)] * 2]


def swapped_profile() -> bytes:
    """A colour profile like sRGB, but with red and green exchanged: red pixels are meant to look green."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"....", b"gXYZ", 1)
    return swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_to_srgb(mode: str) -> None:
    image = Image.new("RGB", (2, 2), RED).convert(mode)
    stored = encoded(image, "PNG", icc_profile=swapped_profile())
    assert pixels(open_image(io.BytesIO(stored))) == [[list(GREEN)] * 2] * 2


def test_srgb_itself_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored = encoded(Image.fromarray(UPRIGHT), "PNG", icc_profile=profile)
    assert pixels(open_image(io.BytesIO(stored))) == UPRIGHT.tolist()


@pytest.mark.parametrize(  # with names: a profile holds the time that it was made, and workers would not agree on it
    ("mode", "profile"), [("RGB", b"no profile"), ("L", swapped_profile())], ids=["no profile", "of RGB"]
)
def test_a_profile_that_is_broken_or_does_not_fit_is_told_and_ignored(
    mode: str, profile: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "odd.png").write_bytes(encoded(Image.new("RGB", (1, 1), RED).convert(mode), "PNG", icc_profile=profile))
    plain = Image.new("RGB", (1, 1), RED).convert(mode).convert("RGB")
    assert pixels(open_image(tmp_path / "odd.png")) == pixels(plain)
    assert caplog.text == ""  # training tells it once, when it checks the pictures
    (checked,) = check_images(["odd.png"], lambda _: tmp_path / "odd.png")
    assert checked == ((1, 1), digest_of((tmp_path / "odd.png").read_bytes()))
    assert "odd.png: its colour profile is ignored: cannot " in caplog.text


def chunk(kind: bytes, content: bytes, *, sound: bool = True) -> bytes:
    crc = zlib.crc32(kind + content) ^ (0 if sound else 1)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


@pytest.mark.parametrize(
    "beside",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 5_000_000)),
        chunk(b"tIME", bytes(7), sound=False),
        chunk(b"tEXt", b"prompt\0a cat", sound=False),
    ],
    ids=["a long text", "a wrong checksum of a time", "a wrong checksum of a text"],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_read_whatever_lies_beside_its_pixels(tmp_path: Path, beside: bytes, place: str) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (9, 7), (200, 10, 30, 128)).save(file, "PNG")
    content = file.getvalue()
    at = 33 if place == "before" else len(content) - 12  # after the header, or before the end
    (tmp_path / "a.png").write_bytes(content[:at] + beside + content[at:])
    (tmp_path / "plain.png").write_bytes(content)
    read, plain = open_image(tmp_path / "a.png"), open_image(tmp_path / "plain.png")
    assert read.tobytes() == plain.tobytes()
    assert [found.size for found in check_images(["a.png"], lambda _: tmp_path / "a.png")] == [(9, 7)]


def test_a_png_with_broken_pixels_is_not_read(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[100] ^= 255
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "way"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC is read with pip install pillow-heif"),
        (b"\xff\x0a" + bytes(100), "JPEG XL is not read; convert it: djxl"),
    ],
)
def test_pictures_of_other_kinds_are_named_with_the_way_to_convert_them(
    tmp_path: Path, content: bytes, way: str
) -> None:
    (tmp_path / "a.heic").write_bytes(content)
    with pytest.raises(DataError, match=way):
        open_image(tmp_path / "a.heic")

"""open_image: any supported image file as upright 8 bit RGB."""

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from finetune.errors import DataError

_log = logging.getLogger(__name__)

WHITE = "white"

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What a file may hold, whatever its name. Not all that Pillow knows: it hands EPS, for one, to Ghostscript to run."""

READ_ERRORS = (
    OSError,  # UnidentifiedImageError among them
    ValueError,
    TypeError,  # TIFF tags of the wrong type
    SyntaxError,
    RuntimeError,  # the AVIF decoder
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for broken files of the various kinds."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored pixels upright."""

_ON_ITS_SIDE = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


@dataclass(frozen=True)
class Member:
    """A file inside of a tar file."""

    shard: Path
    name: str
    """A relative one, without ".."."""
    offset: int
    size: int

    @property
    def place(self) -> Path:
        """What it is remembered by; no path on the disk."""
        return self.shard / self.name

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Row:
    """A picture in a table that does not change."""

    place: Path
    """What it is remembered by, of that table alone; no path on the disk."""
    read: Callable[[], bytes]


PictureFile = Path | Member | Row | IO[bytes]


def read_file(source: PictureFile) -> bytes:
    """Everything in a file. Raises OSError, or ValueError with the reason for what holds no picture."""
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("not a regular file")  # a pipe would be waited for
    if isinstance(source, Member):
        with source.shard.open("rb") as file:
            file.seek(source.offset)
            content = file.read(source.size)
        if len(content) < source.size:
            raise ValueError("the shard is cut short")
    elif isinstance(source, Row):
        content = source.read()
    else:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            file.seek(0)
            content = file.read()
    if not content:
        raise ValueError("the file is empty")
    return content


def open_image(
    source: PictureFile, name: str | None = None, digest: str | None = None, background: str = WHITE
) -> Image.Image:
    """The picture in a file, fully decoded: RGB, 8 bit, upright (see `to_rgb`); the first frame of an animation.

    Args:
        source: a path, or a binary file that can seek.
        name: what error messages call it; the path unless given.
        digest: of the bytes that the file should hold.
        background: colour that shows where it is transparent.

    Raises:
        DataError: "NAME: reason", for what is no picture, truncated, empty, a decompression bomb, or another file.
    """
    try:
        content = read_file(source)
        if digest is not None and digest_of(content) != digest:
            raise ValueError("the file has changed since the start; start again")
        return _decode(content, background)
    except READ_ERRORS as error:
        raise DataError(f"{name or source}: {reason_of(error)}") from error


def open_alpha(source: PictureFile) -> Image.Image | None:
    """The alpha channel of the picture in a file, 8 bit grey, upright; None where it has none. Raises DataError."""
    try:
        with Image.open(io.BytesIO(read_file(source))) as image:
            upright = _upright(image)
            return upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
    except READ_ERRORS as error:
        raise DataError(f"{source}: {reason_of(error)}") from error


def open_reduced(source: PictureFile, side: int) -> tuple[tuple[int, int], Image.Image]:
    """Width and height of the picture in a file, and the picture as by `open_image`, but perhaps smaller.

    The sides of a JPEG are divided by up to eight, as long as both remain at least `side`, which is faster.

    Raises:
        DataError: as `open_image`.
    """

    def decode(content: bytes) -> tuple[tuple[int, int], Image.Image]:
        with _opened(content) as image:
            size = upright_size(image)
            image.draft(image.mode, (side, side))
            image.load()
            return size, to_rgb(image)

    try:
        return _whatever_lies_beside(decode, read_file(source))
    except READ_ERRORS as error:
        raise DataError(reason_of(error)) from error


def open_mask(file: PictureFile, digest: str | None = None) -> Image.Image:
    """A loss mask: 8 bit grey, black where it is transparent. Raises DataError for what is no picture, or not of these
    bytes.
    """
    return open_image(file, digest=digest, background="black").convert("L")


def _decode(content: bytes, background: str) -> Image.Image:
    def decode(content: bytes) -> Image.Image:
        with _opened(content) as image:
            image.load()
            return to_rgb(image, background=background)

    return _whatever_lies_beside(decode, content)


def decoded_size(content: bytes, name: str) -> tuple[int, int]:
    """Width and height of `_decode`'s answer, which fails for the same pictures.

    A JPEG's pixels are computed at an eighth of its size, from all of its bytes: three to eight times as fast.
    """

    def measure(content: bytes) -> tuple[int, int]:
        with _opened(content) as image:
            width, height = image.size
            image.draft(image.mode, (1, 1))
            image.load()
            turned = _orientation(image) in _ON_ITS_SIDE
            to_rgb(image, name)
        return (height, width) if turned else (width, height)

    return _whatever_lies_beside(measure, content)


T = TypeVar("T")


def _whatever_lies_beside(read: Callable[[bytes], T], content: bytes) -> T:
    """What `read` makes of a file; of a PNG that it fails for, what it makes of the pixels alone.

    Pillow refuses long texts and colour profiles (the prompts and workflows that image generators leave), and wrong
    checksums of chunks that are no pixels.
    """
    try:
        return read(content)
    except READ_ERRORS:
        if not content.startswith(_PNG):
            raise
        try:
            return read(_pixels_of_png(content))
        except READ_ERRORS:
            pass
        raise


_PNG = b"\x89PNG\r\n\x1a\n"
_ABOUT_PIXELS = (b"tRNS", b"eXIf", b"gAMA", b"sRGB")
"""Chunks that change how a PNG looks, beside the critical ones."""


def _pixels_of_png(content: bytes) -> bytes:
    """Return the PNG without texts, profile and other chunks that do not affect its pixels or have a wrong checksum."""
    chunks, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        kind, end = content[at + 4 : at + 8], at + 12 + size
        sound = struct.pack(">I", zlib.crc32(content[at + 4 : end - 4])) == content[end - 4 : end]
        if kind[:1].isupper() or (kind in _ABOUT_PIXELS and sound):
            chunks.append(content[at:end])
        at = end
    return b"".join(chunks)


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are read; HEIC is among them where its package is installed."""
    Image.init()  # all formats, before threads race to register them
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return tuple(name for name in Image.ID if name in _FORMATS)
    register_heif_opener()
    return tuple(name for name in Image.ID if name in (*_FORMATS, "HEIF"))


def _opened(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        if content[4:8] == b"ftyp" and content[8:12] in _HEIC:
            raise ValueError("HEIC is read with pip install pillow-heif; or convert it: magick a.heic a.png") from None
        if content.startswith(_JPEG_XL):
            raise ValueError("JPEG XL is not read; convert it: djxl a.jxl a.png") from None
        raise


_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def reason_of(error: Exception) -> str:
    """What is wrong, in one line that does not repeat the path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def digest_of(content: bytes) -> str:
    """A digest of bytes: 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]  # which many processors have instructions for


def to_rgb(image: Image.Image, name: str | None = None, background: str = WHITE) -> Image.Image:
    """`image` as 8 bit RGB: turned as its EXIF says, transparency over a background colour, 16 bit grey scaled.

    An embedded colour profile is converted to sRGB; one that is broken or does not fit the pixels is ignored, which is
    told where the picture has a `name`.

    Raises:
        ValueError: the pixels have no known range (floats, or whole numbers beyond 16 bits).
    """
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, background)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        behind = Image.new("RGBA", opaque.size, background)
        return _in_srgb(Image.alpha_composite(behind, opaque).convert("RGB"), image.info.get("icc_profile"), name)
    return _in_srgb(image.convert("RGB") if image.mode in ("1", "P") else image, image.info.get("icc_profile"), name)


def _in_srgb(image: Image.Image, profile: bytes | None, name: str | None) -> Image.Image:
    """RGB pixels that look the same without the profile as `image` with it."""
    if not profile:
        return _as_rgb(image)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return _as_rgb(image)
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        if name is not None:
            _log.warning("%s: its colour profile is ignored: %s", name, error)
        return _as_rgb(image)
    return converted or image


def _as_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the EXIF block again, and fails on blocks that can be read but not written.
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture turned as its EXIF says."""
    width, height = image.size
    return (height, width) if _orientation(image) in _ON_ITS_SIDE else (width, height)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):  # a broken EXIF block does not spoil the pixels
        return 1


def _deep_grey_to_rgb(image: Image.Image, background: str) -> Image.Image:
    """16 bit grey -> RGB. Pillow's own convert() would clip everything above 255 to white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels of mode {image.mode} with no known range; save it with 8 or 16 bits per channel")
    grey = ((values.astype(np.int32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded to nearest
    rgb = Image.fromarray(grey).convert("RGB")
    if (transparent := image.info.get("transparency")) is not None:
        rgb.paste(background, mask=Image.fromarray(values == transparent))
    return rgb

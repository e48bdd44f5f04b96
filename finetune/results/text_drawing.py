"""Text on images, in the scripts of Pillow's own font or a system font; never boxes."""

from functools import cache
from itertools import groupby
from typing import Any

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "msgothic.ttc", "malgun.ttf"),
    *("NotoEmoji-Regular.ttf", "Symbola.ttf", "seguiemj.ttf", "seguisym.ttf"),
)
"""Fonts of Linux, macOS and Windows for what Pillow's own has not: first European scripts, then CJK, then symbols."""

_NO_CHARACTER = "\uffff"
"""What every font draws as its box."""


@cache
def _fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font, then those of the system that are there."""
    fonts: list[Font] = [ImageFont.load_default(size=size)]
    for name in _SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(fonts)


@cache
def _font_for(character: str, size: int) -> Font | None:
    """The first font that has the character."""
    if character.isspace():
        return _fonts(size)[0]
    if not character.isprintable():
        return None
    return next((font for font in _fonts(size) if _shape(character, font) != _shape(_NO_CHARACTER, font)), None)


@cache
def _shape(character: str, font: Font) -> bytes:
    """The pixels that a font draws."""
    pixels: Any = font.getmask(character)
    return bytes(pixels)


def _pieces(text: str, size: int) -> list[tuple[str, Font]]:
    """The text on one line, cut into pieces of one font; what no font has is escaped, as Python writes it."""
    plain = "".join(
        character if _font_for(character, size) else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in " ".join(text.split())
    )
    return [("".join(some), font) for font, some in groupby(plain, lambda c: _font_for(c, size)) if font]


def width_of(text: str, size: int) -> float:
    """How many pixels wide `write` makes the text."""
    return sum(font.getlength(piece) for piece, font in _pieces(text, size))


def fitting(text: str, size: int, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    text = text[: int(width)]  # no letter is narrower than a pixel, and captions may be very long
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: str) -> None:
    """Write one line of text, its upper left corner at `place`."""
    x, y = place
    for piece, font in _pieces(text, size):
        draw.text((x, y + size), piece, fill=colour, font=font, anchor="ls")
        x += font.getlength(piece)

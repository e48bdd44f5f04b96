"""A contact sheet: images as the model sees them, each with name, caption and token count."""

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from finetune.results.sampling import MARGIN
from finetune.results.text_drawing import fitting, width_of, write

CELL = 192
"""Width and height of a picture on the sheet, in pixels."""
COLUMNS = 5
_LETTERS = 11


def contact_sheet(
    pixels: Sequence[Tensor], names: Sequence[str], captions: Sequence[str], tokens: Sequence[int], limit: int
) -> Image.Image:
    """Lay out the pictures with text below each: name, caption, token count (red where over the limit).

    Args:
        pixels: (3, H, W) uint8 each.
        names, captions, tokens: of at least as many pictures.
        limit: tokens that the model reads; 0: no token counts.
    """
    line = 14
    cell_height = CELL + 4 * line + MARGIN
    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), MARGIN + rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pixels):
        x = MARGIN + number % columns * (CELL + MARGIN)
        y = MARGIN + number // columns * cell_height
        scale = CELL / max(picture.shape[1:])
        small = to_pil_image(picture).resize(
            (round(picture.shape[2] * scale), round(picture.shape[1] * scale)), Image.Resampling.LANCZOS
        )
        sheet.paste(small, (x + (CELL - small.width) // 2, y + (CELL - small.height) // 2))
        first, second = _two_lines(captions[number])
        count = f"{tokens[number]} of {limit} tokens" if limit else ""
        texts = ((names[number], "gray"), (first, "black"), (second, "black"))
        for row, (text, colour) in enumerate((*texts, (count, "red" if tokens[number] > limit else "gray"))):
            write(draw, (x, y + CELL + row * line), fitting(text, _LETTERS, CELL), _LETTERS, colour)
    return sheet


def _two_lines(text: str) -> tuple[str, str]:
    """The text broken after the last word that fits into one line; what is left may still be too long."""
    words, first = text.split(), ""
    while words and width_of(f"{first} {words[0]}".strip(), _LETTERS) <= CELL:
        first = f"{first} {words.pop(0)}".strip()
    return (first, " ".join(words)) if first else (text, "")

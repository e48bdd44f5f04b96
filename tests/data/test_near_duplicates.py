"""Near duplicates of pictures with as much to see as photographs have."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from finetune.data.near_duplicates import make_thumbnail, near_duplicates


def scene(seed: int, width: int = 180, height: int = 120) -> Image.Image:
    """Blurred patches of colour, some large, some small."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    for size in (90, 50, 50, 30, 30, 20, 20, 20, 12, 12, 12):
        patch = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
        picture.paste(patch, (int(rng.integers(-10, width - 10)), int(rng.integers(-10, height - 10))))
    return picture.filter(ImageFilter.GaussianBlur(2))


def cropped(picture: Image.Image, rng: random.Random) -> Image.Image:
    width, height = (int(side * rng.uniform(0.6, 0.95)) for side in picture.size)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return picture.crop((left, top, left + width, top + height))


def tinted(picture: Image.Image, rng: random.Random) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.85, 1.15))
    return picture


def encoded_again(picture: Image.Image, rng: random.Random) -> Image.Image:
    smaller = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3))
    smaller.save(file := io.BytesIO(), "JPEG", quality=rng.randint(35, 80))
    return Image.open(file).convert("RGB")


def mirrored(picture: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.mirror(picture)


CHANGES = [(cropped,), (mirrored,), (tinted,), (encoded_again,), (cropped, mirrored, tinted, encoded_again)]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(change.__name__ for change in changes))
def test_a_changed_picture_is_known_and_no_other_is(changes: tuple) -> None:
    rng, count = random.Random(0), 10
    originals = [scene(seed, *((180, 120), (120, 180), (150, 150))[seed % 3]) for seed in range(count)]
    changed = []
    for picture in originals:
        for change in changes:
            picture = change(picture, rng)
        changed.append(picture)
    thumbnails = [make_thumbnail(picture) for picture in (*originals, *changed)]
    assert near_duplicates(thumbnails, range(count)) == [{count + index} for index in range(count)]
    assert near_duplicates(thumbnails, range(count, 2 * count)) == [{index} for index in range(count)]


def test_a_blank_picture_is_like_no_other() -> None:
    blank = [make_thumbnail(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue", "white")]
    assert near_duplicates([*blank, make_thumbnail(scene(0))], range(4)) == [set(), set(), set(), set()]

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from finetune.results.memorization import FEWEST, distances, features, originals


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    """Different ones: 5 x 4 blots of the same four colours in another order, 80 x 64."""
    colours = np.tile(np.array([[230, 40, 40], [20, 60, 200], [240, 230, 220], [30, 30, 30]], np.uint8), (5, 1))
    orders = [np.random.default_rng([7, first + number]).permutation(20) for number in range(count)]
    blots = [Image.fromarray(colours[order].reshape(4, 5, 3)) for order in orders]
    return [each.resize((80, 64), Image.Resampling.BICUBIC) for each in blots]


def changed(picture: Image.Image) -> Image.Image:
    """What is drawn from memory: a little darker, a little less of it."""
    return ImageEnhance.Brightness(picture.crop((2, 1, 79, 62))).enhance(0.96)


def test_near_copies_are_told_from_new_pictures() -> None:
    known = originals(pictures(40), mirrored=False)
    assert known is not None
    assert known.copied([changed(picture) for picture in pictures(40)]) >= 38
    assert known.copied(pictures(200, first=40)) <= 6
    assert known.copied([ImageOps.mirror(picture) for picture in pictures(40)]) <= 8


def test_mirrored_copies_count_where_mirror_images_are_learned_from() -> None:
    known = originals(pictures(40), mirrored=True)
    assert known is not None
    assert known.copied([ImageOps.mirror(changed(picture)) for picture in pictures(40)]) >= 38


def test_the_same_picture_in_other_bytes_does_not_say_how_alike_different_ones_are() -> None:
    alone, doubled = (originals([*pictures(20), *map(changed, more)], mirrored=False) for more in ([], pictures(20)))
    assert alone is not None
    assert doubled is not None
    assert doubled.near > 0.8 * alone.near


def test_too_few_different_pictures_tell_nothing() -> None:
    assert originals(pictures(FEWEST - 1), mirrored=True) is None
    assert originals(pictures(1) * 5, mirrored=False) is None
    assert originals(pictures(FEWEST), mirrored=False) is not None


def test_features_of_halves_in_two_colours_are_known() -> None:
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (0, 0, 64, 32))
    (found,) = features([picture])
    cells = found[:192].reshape(8, 8, 3) * np.sqrt(192)
    assert (cells[:4] == 1).all()
    assert (cells[4:] == 0).all()
    assert found[192] == found[255] == np.sqrt(0.5)
    assert distances(found[None], found[None]) == 0

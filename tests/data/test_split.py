"""Pictures that are held out."""

import random
from pathlib import Path

import pytest

from finetune.data.image_folder import ImageFolder
from finetune.data.image_index import ImageIndex
from finetune.data.split import default_fraction, held_out
from tests.data.test_near_duplicates import cropped, encoded_again, scene


def saved(folder: Path, count: int, copies: int = 0) -> ImageFolder:
    """Some scenes, and for each of the first `copies` a crop and a smaller file of it."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(1)
    for seed in range(count):
        picture = scene(seed)
        picture.save(folder / f"{seed:02d}.png")
        if seed < copies:
            cropped(picture, rng).save(folder / f"{seed:02d}-crop.png")
            encoded_again(picture, rng).save(folder / f"{seed:02d}-small.png")
    return ImageFolder(folder, prompt="x", resolution=64)


def names(pictures: ImageFolder, held: list[int]) -> set[str]:
    return {pictures.ids[index] for index in held}


@pytest.mark.parametrize(("pictures", "fraction"), [(1, 0), (19, 0), (20, 0.1), (2000, 0.1), (10_000, 0.02)])
def test_by_default_a_tenth_is_held_out_but_not_of_a_few_and_not_of_very_many(pictures: int, fraction: float) -> None:
    assert default_fraction(pictures) == fraction


def test_near_duplicates_are_on_one_side_that_of_the_largest(tmp_path: Path) -> None:
    pictures = saved(tmp_path, 8, copies=8)
    sides = []
    for seed in range(3):
        held = names(pictures, held_out(pictures, 0.3, seed))
        assert len(held) >= 2
        assert {name[:2] for name in held} == {name[:2] for name in held if name.endswith("crop.png")}
        assert len(held) == 3 * len({name[:2] for name in held})
        sides.append(frozenset(held))
    assert len(set(sides)) > 1


def test_a_picture_stays_where_it_is_when_others_are_added(tmp_path: Path) -> None:
    before = saved(tmp_path, 9)
    held = {seed: names(before, held_out(before, 0.4, seed)) for seed in range(3)}
    after = saved(tmp_path, 15, copies=4)
    for seed, earlier in held.items():
        now = names(after, held_out(after, 0.4, seed))
        assert len(earlier) > 2
        assert now & set(before.ids) == earlier


def test_nothing_is_held_out_at_0_and_at_least_two_above(tmp_path: Path) -> None:
    pictures = saved(tmp_path, 5)
    assert held_out(pictures, 0.0, 0) == []
    assert all(len(held_out(pictures, 0.01, seed)) == 2 for seed in range(5))


def test_pictures_of_one_film_are_trained_on(tmp_path: Path) -> None:
    rng = random.Random(0)
    for frame in range(9):
        cropped(scene(99), rng).save(tmp_path / f"frame-{frame:02d}.png")
    pictures = saved(tmp_path, 4)
    for seed in range(3):
        held = names(pictures, held_out(pictures, 0.2, seed))
        assert len(held) >= 2
        assert not any(name.startswith("frame") for name in held)


def test_what_was_found_out_is_remembered(tmp_path: Path) -> None:
    pictures, memory = saved(tmp_path / "pictures", 8), ImageIndex(tmp_path / "cache")
    held = held_out(pictures, 0.3, 0, memory)
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    assert held_out(pictures, 0.3, 0, ImageIndex(tmp_path / "cache")) == held

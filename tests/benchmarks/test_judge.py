import numpy as np
import pytest
from draw_butterflies import draw as draw_butterfly
from draw_butterflies import invent as invent_butterfly
from draw_world import draw, invent
from judge import TRAITS, ButterflyReader, copies, drawn, energy_distance, invented, read, through_vae
from PIL import Image

import finetune as ft
from finetune.results.memorization import features


def test_the_judge_reads_true_pictures_right_before_and_after_the_vae() -> None:
    scenes = [invent(np.random.default_rng([3, i]), unseen=True) for i in range(120)]
    pictures = [draw(scene, 64) for scene in scenes]
    truth = [(scene.thing, scene.colour, scene.ground) for scene in scenes]
    assert [tuple(read(picture)) for picture in pictures] == truth
    decoded = through_vae(ft.load_model("tiny").encoder, pictures)
    right = [tuple(read(picture)) == true for picture, true in zip(decoded, truth, strict=True)]
    assert np.mean(right) >= 0.98


def test_an_empty_picture_shows_nothing() -> None:
    assert read(Image.new("RGB", (64, 64), (204, 50, 44)))[0] == "nothing"


@pytest.fixture(scope="module")
def butterflies() -> np.ndarray:
    return features([draw_butterfly(invent_butterfly(np.random.default_rng([7, i])), 48) for i in range(60)])


def test_features_have_the_shape_that_they_state(butterflies: np.ndarray) -> None:
    assert butterflies.shape == (60, 384)


def test_the_energy_distance_is_small_between_halves_and_large_to_another_world(butterflies: np.ndarray) -> None:
    world_size = features([draw(invent(np.random.default_rng([8, i])), 64) for i in range(60)])
    halves = energy_distance(butterflies[:30], butterflies[30:])
    assert abs(halves) < 0.02
    assert energy_distance(world_size, butterflies) > 0.1


def test_the_energy_distance_is_as_computed_by_hand() -> None:
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    # 2 E|x-y| = 2 (1 + 5 + 1 + 3) / 4 = 5; E|x-x'| = 2; E|y-y'| = 4
    assert energy_distance(a, b) == pytest.approx(-1.0)


def test_copies_are_counted_and_strangers_are_not(butterflies: np.ndarray) -> None:
    training, held_out, strangers = butterflies[:20], butterflies[20:40], butterflies[40:]
    assert copies(training[:5] + 1e-4, training, held_out) == 1.0
    some = copies(strangers, training, held_out)
    assert some <= 0.25  # 1 % in expectation were there more than 20 to set the threshold by
    assert copies(np.concatenate([strangers, training]), training, held_out) == pytest.approx((1 + some) / 2)


@pytest.mark.slow
def test_the_reader_learns_what_captions_say_and_is_blind_to_colours() -> None:
    butterflies = invented(9, 80)
    pictures = drawn(butterflies)
    reader = ButterflyReader()
    before = reader.obeyed(pictures, butterflies)
    reader.learn(pictures, butterflies, epochs=20)
    after = reader.obeyed(pictures, butterflies)
    assert after.keys() == set(TRAITS)
    assert after["view"] >= 0.95 > before["view"]
    assert after["shape"] > 0.5 > before["shape"]
    seen = reader.features(pictures[:4])
    assert seen.shape == (4, 128)
    assert np.allclose(reader.features([picture.convert("L") for picture in pictures[:4]]), seen, atol=1e-4)
    other = ButterflyReader()
    other.learn(pictures, butterflies, epochs=20)
    assert np.array_equal(other.features(pictures[:4]), seen)  # everything random is drawn from the seed

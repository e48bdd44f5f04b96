"""The drawing programs: what they draw is what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from draw_butterflies import invent as invent_butterfly
from draw_tasks import butterflies as task_butterflies
from draw_tasks import poses
from draw_world import GROUNDS, INKS, SHAPES, STYLES, THINGS, UNTOLD, describe, draw, held_out, invent, scribble
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def task(folder: Path, *options: str) -> tuple[list[Path], list[str]]:
    """Draw a task; its pictures and captions."""
    command = [sys.executable, str(EXAMPLES / "draw_tasks.py"), *options, "--size", "32", "--output", str(folder)]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [folder / row["file_name"] for row in rows], [row["text"] for row in rows]


def test_training_scenes_show_no_held_out_pair_and_unseen_ones_only_those() -> None:
    scenes = [invent(np.random.default_rng([0, i])) for i in range(2000)]
    assert not any(held_out(scene.thing, scene.colour) for scene in scenes)
    assert {scene.thing for scene in scenes} == set(THINGS)
    unseen = [invent(np.random.default_rng([1, i]), unseen=True) for i in range(300)]
    pairs = {(scene.thing, scene.colour) for scene in unseen}
    assert pairs == {(shape, colour) for shape in SHAPES for colour in INKS if held_out(shape, colour)}
    assert len(pairs) == 11


def test_a_scene_is_drawn_and_described_the_same_each_time_and_truly() -> None:
    scene = invent(np.random.default_rng(5))
    assert np.array_equal(np.asarray(draw(scene, 64)), np.asarray(draw(scene, 64)))
    captions = [describe(scene, np.random.default_rng(i)) for i in range(400)]
    assert all(scene.thing in caption or any(word in caption for word in UNTOLD) for caption in captions)
    assert 0.02 < np.mean([any(word in caption for word in UNTOLD) for caption in captions]) < 0.12
    others = {*INKS, *(style for style in STYLES)} - {scene.colour, scene.style}
    assert not any(word in caption.split(" on a ")[0].split() for caption in captions for word in others)
    told = [caption for caption in captions if "background" in caption]
    assert all(f"on a {scene.ground} background" in caption for caption in told)
    assert len(told) > 300


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_corner_of_a_scene_has_the_colour_of_its_ground(ground: str) -> None:
    scene = next(s for i in range(1000) if (s := invent(np.random.default_rng([2, i]))).ground == ground)
    corner = np.asarray(draw(scene, 64), dtype=float)[0, 0]
    assert np.abs(corner - GROUNDS[ground]).max() < 45


def test_scribbles_differ_and_fill_the_size() -> None:
    one, other = (scribble(np.random.default_rng(i), 32) for i in range(2))
    assert one.size == (32, 32)
    assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() > 10


def test_an_individual_is_one_butterfly_in_many_views(tmp_path: Path) -> None:
    pictures, captions = task(tmp_path, "individual")
    assert len(pictures) == 12
    assert all(caption.startswith("lumo the butterfly on a ") for caption in captions)
    assert len({path.read_bytes() for path in pictures}) == 12
    wings = {(b.individual, b.shape, b.main, b.accent, b.pattern, b.border) for b in poses(12, 0)}
    assert len(wings) == 1
    assert len({(b.view, b.heading, b.backdrop) for b in poses(12, 0)}) > 8


def test_a_confounded_class_names_no_backdrop_and_shows_one(tmp_path: Path) -> None:
    pictures, captions = task(tmp_path / "a", "class", "--count", "5", "--confounded")
    assert captions == ["a swallowtail butterfly"] * 5
    corners = [np.asarray(Image.open(path).convert("RGB"), float)[:2, :2].mean((0, 1)) for path in pictures]
    plain, _ = task(tmp_path / "b", "class", "--count", "5")
    free = [np.asarray(Image.open(path).convert("RGB"), float)[:2, :2].mean((0, 1)) for path in plain]
    assert np.std(corners, axis=0).mean() < np.std(free, axis=0).mean()


def test_a_fifth_of_the_captions_can_be_wrong(tmp_path: Path) -> None:
    _, right = task(tmp_path / "a", "style", "--count", "10")
    _, wrong = task(tmp_path / "b", "style", "--count", "10", "--wrong_captions")
    assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 2
    assert sorted(right) == sorted(wrong)


def test_no_task_shows_a_training_butterfly_or_one_of_another_task() -> None:
    training = {invent_butterfly(np.random.default_rng([0, i])).individual for i in range(48)}
    held = {b.individual for b in task_butterflies("held-out", 200, seed=1)}
    style = {b.individual for b in task_butterflies("style", 24, seed=0)}
    assert not training & held
    assert not training & style
    assert not held & style

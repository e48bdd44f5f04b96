from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.models.loading import load_model
from finetune.results.sampling import (
    MARGIN,
    READABLE,
    draw_pictures,
    first_picture,
    grid,
    grid_pictures,
    save_picture,
    side_by_side,
)


def test_pictures_equal_a_plain_pipeline_call() -> None:
    model = load_model("tiny")
    rows = draw_pictures(model, ["a dog", "a cat"], [7, 8], resolution=64, num_inference_steps=3, guidance_scale=5.0)
    assert [len(row) for row in rows] == [2, 2]
    plain = load_model("tiny").pipeline()
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        "a cat", generator=torch.Generator().manual_seed(8), num_inference_steps=3, guidance_scale=5.0,
        height=64, width=64,
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(rows[1][1]), np.asarray(expected))
    assert not np.array_equal(np.asarray(rows[0][1]), np.asarray(rows[1][1]))


def test_the_unet_samples_in_eval_mode() -> None:
    model = load_model("tiny")
    model.unet.train()
    draw_pictures(model, [""], [0], resolution=64, num_inference_steps=1)
    assert not model.unet.training


def test_the_unet_alone_draws_in_half_precision() -> None:
    model = load_model("tiny")
    seen: dict[str, torch.dtype] = {}
    parts = {"conv": model.unet.conv_in, "unet": model.unet, "vae": model.encoder.vae.decoder}
    for name, part in parts.items():

        def note(_: object, __: object, answer: Any, name: str = name) -> None:
            seen[name] = (answer[0] if isinstance(answer, tuple) else answer).dtype

        part.register_forward_hook(note)
    settings = {"resolution": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    ((whole,),) = draw_pictures(model, ["a dog"], [0], **settings)
    model.unet.to(torch.bfloat16)
    ((half,),) = draw_pictures(model, ["a dog"], [0], **settings)
    assert seen == {"conv": torch.bfloat16, "unet": torch.float32, "vae": torch.float32}
    difference = np.abs(np.asarray(half).astype(int) - np.asarray(whole))
    assert 0 < difference.max() < 64


def test_pixel_models_draw_what_their_pipeline_does_one_picture_a_seed() -> None:
    model = load_model("ddpm", resolution=32)
    (row,) = draw_pictures(model, [""], [0, 1], resolution=32, num_inference_steps=2)
    assert [picture.size for picture in row] == [(32, 32)] * 2
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    theirs = model.pipeline()(batch_size=2, generator=seeds, num_inference_steps=2).images
    assert all(np.array_equal(ours, other) for ours, other in zip(row, theirs, strict=True))
    (alone,) = draw_pictures(model, [""], [1], resolution=32, num_inference_steps=2)
    difference = np.asarray(row[1]).astype(int) - np.asarray(alone[0])
    assert abs(difference).max() <= 1  # a batch of two rounds differently


def test_pictures_of_a_prompt_drawn_as_one_batch_are_those_drawn_one_by_one() -> None:
    model = load_model("tiny")
    settings = {"resolution": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
    calls = []
    model.unet.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    (together,) = draw_pictures(model, ["a dog"], [0, 1, 2], batch_size=2, **settings)
    assert set(calls) == {4, 2}  # two pictures and their negatives, then the third
    (alone,) = draw_pictures(model, ["a dog"], [0, 1, 2], **settings)
    difference = np.abs(np.stack(together).astype(int) - np.stack(alone))
    assert difference.max() <= 1  # a batch of two rounds differently


def test_a_grid_has_a_row_for_each_prompt_and_its_pictures_unchanged() -> None:
    red, blue = Image.new("RGB", (200, 200), "red"), Image.new("RGB", (200, 200), "blue")
    sheet = grid([[red, red], [blue, blue]], ["a red one with a rather long name", "a blue one"], title="step 0")
    pixels = np.asarray(sheet)
    assert (pixels == (255, 0, 0)).all(-1).sum() == (pixels == (0, 0, 255)).all(-1).sum() == 2 * 200 * 200


def test_small_pictures_are_enlarged_so_that_their_labels_fit() -> None:
    sheet = grid([[Image.new("RGB", (64, 64), "red")]], ["a red one"])
    assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() == (3 * 64) ** 2
    assert READABLE <= 3 * 64


def test_one_unlabelled_row_becomes_a_square() -> None:
    sheet = grid([[Image.new("RGB", (200, 200))] * 16], [""])
    assert sheet.width == 4 * 200 + 5 * MARGIN


def test_before_and_after_lie_side_by_side(tmp_path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{name}.png")
    side_by_side(tmp_path / "a.png", tmp_path / "b.png", tmp_path / "both.png")
    pixels = np.asarray(Image.open(tmp_path / "both.png"))
    assert pixels.shape == (30, 40 + MARGIN, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, -1].tolist() == [0, 0, 255]


def test_the_first_picture_of_a_saved_grid_is_found_again(tmp_path) -> None:
    red, blue = (Image.new("RGB", (200, 180), colour) for colour in ("red", "blue"))
    for labels, title in ((["a", "b"], "step 3"), (["", ""], "")):
        save_picture(grid([[red, blue], [blue, blue]], labels, title), tmp_path / "grid.png", shows="this")
        found = first_picture(tmp_path / "grid.png")
        assert found is not None
        assert np.array_equal(np.asarray(found), np.asarray(red))
    save_picture(red, tmp_path / "plain.png")
    assert first_picture(tmp_path / "plain.png") is None
    assert first_picture(tmp_path / "none.png") is None


@pytest.mark.parametrize(
    ("rows", "labels", "title"),
    [([3, 3], ["a", "b"], "step 4"), ([5], [""], ""), ([1], ["a"], "step 0"), ([2, 2, 2], ["", "", ""], "")],
)
@pytest.mark.parametrize("side", [16, 64, 200])
def test_the_pictures_of_a_saved_grid_are_read_back(
    tmp_path: Path, rows: list[int], labels: list[str], title: str, side: int
) -> None:
    noise = np.random.default_rng(0)
    drawn = [[Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(n)] for n in rows]
    save_picture(grid(drawn, labels, title=title), tmp_path / "grid.png")
    found = grid_pictures(tmp_path / "grid.png", sum(rows), side)
    assert [np.asarray(picture).tobytes() for picture in found] == [
        np.asarray(picture).tobytes() for row in drawn for picture in row
    ]
    assert grid_pictures(tmp_path / "none.png", 1, side) == []

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from finetune.data.transforms import Preprocess, normalize
from finetune.errors import UsageError

SHAPES = [(64, 64), (97, 33), (33, 98), (100, 37), (5, 7), (7, 5), (16, 16), (31, 32), (16, 800), (3, 3), (1023, 767)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("resolution", [16, 31])
def test_center_crop_is_bit_for_bit_what_torchvision_gives(width: int, height: int, resolution: int):
    image = picture(width, height)
    pixels, time_ids = Preprocess(resolution)(image, key=0)
    expected = v2.Compose([v2.Resize(resolution, antialias=True), v2.CenterCrop(resolution), v2.PILToTensor()])(image)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)
    resized = v2.Resize(resolution, antialias=True)(image)
    assert time_ids.dtype == torch.int64
    assert time_ids.tolist() == [
        height,
        width,
        round((resized.height - resolution) / 2),
        round((resized.width - resolution) / 2),
        resolution,
        resolution,
    ]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_squash_is_bit_for_bit_torchvisions_resize_of_both_sides(width: int, height: int):
    image = picture(width, height)
    pixels, time_ids = Preprocess(24, resize_mode="squash", center_crop=False)(image, key=5)
    expected = v2.Compose([v2.Resize((24, 24), antialias=True), v2.PILToTensor()])(image)
    assert torch.equal(pixels, expected)
    assert time_ids.tolist() == [height, width, 0, 0, 24, 24]


@pytest.mark.parametrize("wide", [True, False])
def test_random_crop_is_the_place_that_geometry_says(wide: bool):
    image = picture(24, 16) if wide else picture(16, 24)
    resized = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    for key in range(20):
        pixels, time_ids = Preprocess(16, center_crop=False)(image, key)
        top, left = time_ids[2:4].tolist()
        assert torch.equal(pixels, resized[:, top : top + 16, left : left + 16])


@pytest.mark.parametrize(("size", "top_left"), [((20, 16), 3), ((16, 20), 2)], ids=["wide", "tall"])
def test_random_crop_is_a_pure_function_of_the_key_and_reaches_every_place_alike(size: tuple[int, int], top_left: int):
    image = picture(*size)
    transform = Preprocess(16, center_crop=False)
    first = [transform(image, key)[1][top_left].item() for key in range(1000)]
    assert first == [transform(image, key)[1][top_left].item() for key in range(1000)]
    counts = Counter(first)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(counts.values()) < 1.4 * min(counts.values())


def test_flip_mirrors_the_same_crop_and_counts_its_corner_in_the_mirrored_picture():
    image = picture(30, 16)
    for center_crop in (True, False):
        transform = Preprocess(16, center_crop=center_crop, random_flip=True)
        pixels, time_ids = transform(image, key=3)
        mirrored, turned = transform(image, key=3, flip=True)
        assert torch.equal(mirrored, pixels.flip(-1))
        assert turned.tolist() == [16, 30, 0, 30 - 16 - time_ids[3].item(), 16, 16]


def test_the_caller_alone_decides_about_the_flip():
    image = picture(16, 16)
    plain, flippable = Preprocess(16), Preprocess(16, random_flip=True)
    assert all(torch.equal(plain(image, key)[0], flippable(image, key)[0]) for key in range(8))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans(), st.integers(0, 2**63 - 1))
def test_every_shape_gives_a_square_from_inside_the_picture(
    width: int, height: int, resolution: int, center_crop: bool, key: int
):
    image = Image.new("RGB", (width, height), "white")
    pixels, time_ids = Preprocess(resolution, center_crop=center_crop)(image, key)
    assert pixels.shape == (3, resolution, resolution)
    assert pixels.min() == 255  # black would be from outside
    assert min(time_ids[2:4].tolist()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution = 0: expected 1 or more"),
        ({"resolution": 8, "resize_mode": "pad"}, "resize_mode = 'pad': choose crop or squash"),
        ({"resolution": 8, "background": "wite"}, "background = 'wite': expected a colour: black, grey, #ff8000"),
        (
            {"resolution": 8, "background": "#ff000080"},
            "background = '#ff000080': expected a colour: black, grey, #ff8000",
        ),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(UsageError) as caught:
        Preprocess(**options)
    assert str(caught.value) == message


def test_normalize_gives_every_value_its_place_from_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    x = normalize(pixels)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    torch.testing.assert_close(x, pixels.double().sub(127.5).div(127.5).float())

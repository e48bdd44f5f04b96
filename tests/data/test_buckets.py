from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune.data.buckets import Buckets
from finetune.data.transforms import Preprocess
from finetune.errors import UsageError

SD15 = Buckets(512, 256, 1024, 64)
SIDES = st.integers(1, 4000)


def test_the_buckets_of_512_px() -> None:
    assert SD15.sizes() == [
        (256, 1024), (256, 960), (256, 896), (256, 832), (320, 768), (320, 704), (384, 640), (448, 576), (512, 512),
        (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("picture", "bucket"),
    [
        ((1024, 1024), (512, 512)),
        ((1024, 682), (640, 384)),
        ((576, 1024), (384, 640)),
        ((4000, 3000), (576, 448)),
        ((4000, 1000), (1024, 256)),
        ((512, 511), (448, 448)),  # the square would enlarge it
        ((600, 480), (576, 448)),
        ((300, 200), (256, 256)),  # no side is shorter
        ((100, 100), (256, 256)),
    ],
)
def test_a_picture_goes_to_the_nearest_shape_and_is_not_enlarged(
    picture: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert SD15.size(*picture) == bucket


def test_small_pictures_are_enlarged_when_told() -> None:
    told = Buckets(512, 256, 1024, 64, upscale=True)
    assert told.size(512, 511) == (512, 512)
    assert told.size(300, 200) == (640, 384)


@given(width=SIDES, height=SIDES, upscale=st.booleans())
def test_every_size_is_allowed_and_no_picture_is_enlarged_that_need_not_be(
    width: int, height: int, upscale: bool
) -> None:
    wide, high = Buckets(512, 256, 1024, 64, upscale).size(width, height)
    assert wide % 64 == high % 64 == 0
    assert 256 <= min(wide, high) <= max(wide, high) <= 1024
    assert wide * high <= 512 * 512
    if not upscale:
        assert wide <= max(width, 256)
        assert high <= max(height, 256)


@given(width=st.integers(600, 4000), height=st.integers(600, 4000))
def test_large_pictures_get_the_nearest_ratio(width: int, height: int) -> None:
    def distance(size: tuple[int, int]) -> float:
        return abs(log(size[0] / size[1] * height / width))

    chosen = SD15.size(width, height)
    if width >= 1024 and height >= 1024:
        assert distance(chosen) == pytest.approx(min(map(distance, SD15.sizes())))


@pytest.mark.parametrize("center", [True, False])
def test_a_bucket_is_cut_out_of_the_picture_scaled_to_cover_it(center: bool) -> None:
    image = Image.linear_gradient("L").resize((150, 100)).convert("RGB")
    transform = Preprocess(64, center_crop=center, buckets=Buckets(64, 32, 128, 8))
    crop = transform.crop(150, 100, key=3)
    assert crop.size == (48, 80)
    assert crop.resized == (53, 80)
    assert crop.top_left == (2, 0) if center else 0 <= crop.top_left[0] <= 5
    pixels, time_ids = transform(image, key=3)
    assert pixels.shape == (3, 48, 80)
    assert time_ids.tolist() == [100, 150, *crop.top_left, 48, 80]
    flipped, mirrored = transform(image, key=3, flip=True)
    assert torch.equal(flipped, pixels.flip(-1))
    assert mirrored.tolist() == [100, 150, crop.top_left[0], 0, 48, 80]


def test_sides_that_leave_no_bucket_are_told() -> None:
    with pytest.raises(UsageError, match="no bucket with sides from 600 to 1024 in steps of 64"):
        Buckets(512, 600, 1024, 64)
    with pytest.raises(UsageError, match="goes with resize_mode crop and resolution = 512"):
        Preprocess(256, buckets=SD15)
    with pytest.raises(UsageError, match="goes with resize_mode crop"):
        Preprocess(512, resize_mode="squash", buckets=SD15)

"""What an inpainting model is shown: masks that are drawn, and those that come with pictures."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from finetune.cache.image_source import LiveImages
from finetune.data.image_folder import ImageFolder
from finetune.data.transforms import Crop, normalize
from finetune.models.inpainting import MASKS, Inpainting, drawn_mask, mask_number, middle_mask


def test_a_drawn_mask_is_a_function_of_its_key() -> None:
    masks = [drawn_mask(key, 64, 96) for key in range(400)]
    assert {tuple(mask.shape) for mask in masks} == {(1, 64, 96)}
    assert set(torch.cat(masks).unique().tolist()) == {0, 255}
    assert torch.equal(masks[7], drawn_mask(7, 64, 96))
    covered = torch.stack([(mask > 0).float().mean() for mask in masks])
    assert 0.18 < (covered == 1).float().mean() < 0.33  # a quarter
    assert 0.02 < covered.min() < 0.2  # none is empty
    parts = [mask for mask in masks if not mask.all()]
    assert len({mask.numpy().tobytes() for mask in parts}) == len(parts)
    everywhere = torch.stack(parts).float().mean(dim=(0, 1)) / 255
    assert everywhere.min() > 0.05  # no place of a picture is left out
    assert everywhere.max() < 0.7


def test_each_of_the_masks_of_a_picture_is_taken_about_as_often() -> None:
    counts = torch.bincount(torch.tensor([mask_number(key) for key in range(4000)]), minlength=MASKS)
    assert len(counts) == MASKS
    assert counts.min() > 400


def test_a_mask_of_its_own_lies_where_the_picture_does() -> None:
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    crop = Crop(original=(8, 8), resized=(16, 16), top_left=(0, 4), size=(16, 8))
    left, mirrored = (Inpainting().pixels(crop.companion_pixels(mask, flip), crop.size, 0) for flip in (False, True))
    assert set(left.unique().tolist()) == {0, 255}
    assert left[0].eq(255).sum(dim=1).tolist() == [4] * 16
    assert left[0, :, :4].eq(255).all()
    assert torch.equal(mirrored, left.flip(-1))
    smaller = mask.resize((4, 4), Image.Resampling.NEAREST)
    assert Inpainting().pixels(crop.companion_pixels(smaller), crop.size, 0).shape == left.shape


class Halving:
    """An encoder that keeps every second value."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels[..., ::2, ::2]

    def sample(self, latent_params: Tensor, keys: Tensor, purpose: str) -> Tensor:
        return latent_params * 2


def test_the_model_is_shown_nothing_where_it_is_to_paint() -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = middle_mask(16, 16).expand(2, 1, 16, 16)
    encoder: Any = Halving()
    stored = Inpainting().encode(encoder, normalize(pixels), mask)
    hole = (mask > 0)[..., ::2, ::2].expand_as(stored["stored"])
    assert not stored["stored"][hole].any()
    assert torch.equal(stored["stored"][~hole], normalize(pixels)[..., ::2, ::2][~hole])
    assert torch.equal(stored["mask"], (mask > 0)[..., ::2, ::2].to(torch.uint8))
    channels = Inpainting().channels(encoder, stored, torch.arange(2))
    assert channels.shape == (2, 4, 8, 8)
    assert torch.equal(channels[:, :1], stored["mask"].float())
    assert torch.equal(channels[:, 1:], stored["stored"] * 2)
    preview = Inpainting().preview(pixels[0], mask[0])
    covered = (mask[0] > 0).expand_as(preview)
    assert preview[covered].unique().tolist() == [127]
    assert torch.equal(preview[~covered], pixels[0][~covered])


def test_an_empty_condition_is_that_of_a_mask_over_all() -> None:
    encoder: Any = Halving()
    empty = Inpainting().empty(encoder, torch.arange(3), 16)
    assert empty.shape == (3, 4, 8, 8)
    assert empty[:, 0].eq(1).all()
    assert not empty[:, 1:].any()


def test_visits_see_the_hole_of_their_own_mask_or_one_that_is_drawn(tmp_path: Path) -> None:
    for name in ("own", "none"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    to_pil_image(middle_mask(64, 64)).save(tmp_path / "own.mask.png")
    pictures = ImageFolder(tmp_path, "a box", resolution=64)
    visits = LiveImages(pictures, Inpainting())
    own, none = pictures.ids.index("own.png"), pictures.ids.index("none.png")
    for key in range(5):
        assert torch.equal(visits.load(own, key).condition["pixels"], middle_mask(64, 64))
        assert torch.equal(visits.load(none, key).condition["pixels"], drawn_mask(key, 64, 64))
    seen = visits.masked_preview(own, 0).latent_params
    assert torch.equal(seen, visits.preview_pixels(own, 0))
    assert torch.equal(seen[0] == 127, middle_mask(64, 64)[0] > 0)

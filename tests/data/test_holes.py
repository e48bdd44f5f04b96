"""What an inpainting model is shown: masks that are drawn, and those that come with pictures."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from finetune.cache.image_source import LiveImages
from finetune.data.image_folder import ImageFolder
from finetune.data.inpainting import MASKS, drawn_mask, for_people, middle_mask, number_of, placed_mask, small, visible
from finetune.data.transforms import Crop, normalize


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
    counts = torch.bincount(torch.tensor([number_of(key) for key in range(4000)]), minlength=MASKS)
    assert len(counts) == MASKS
    assert counts.min() > 400


def test_a_mask_of_its_own_lies_where_the_picture_does() -> None:
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    placement = Crop(original=(8, 8), scaled=(16, 16), corner=(0, 4), size=(16, 8))
    left = placed_mask(mask, placement, flip=False)
    assert set(left.unique().tolist()) == {0, 255}
    assert left[0].eq(255).sum(dim=1).tolist() == [4] * 16
    assert left[0, :, :4].eq(255).all()
    assert torch.equal(placed_mask(mask, placement, flip=True), left.flip(-1))


def test_what_the_mask_covers_is_shown_as_nothing() -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = middle_mask(16, 16).expand(2, 1, 16, 16)
    seen = visible(torch.cat([pixels, mask], dim=1))
    hole = (mask > 0).expand_as(seen)
    assert not seen[hole].any()
    assert torch.equal(seen[~hole], normalize(pixels)[~hole])
    assert torch.equal(visible(pixels), normalize(pixels))
    assert small(mask, (4, 4))[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    told = for_people(torch.cat([pixels, mask], dim=1)[0])
    assert told[hole[0]].unique().tolist() == [127]
    assert torch.equal(told[~hole[0]], pixels[0][~hole[0]])


def test_visits_see_the_hole_of_their_own_mask_or_one_that_is_drawn(tmp_path: Path) -> None:
    for name in ("own", "none"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    to_pil_image(middle_mask(64, 64)).save(tmp_path / "own.mask.png")
    pictures = ImageFolder(tmp_path, "a box", resolution=64)
    visits = LiveImages(pictures, inpainting=True)
    own, none = pictures.ids.index("own.png"), pictures.ids.index("none.png")
    for key in range(5):
        assert torch.equal(visits.load(own, key)[0][3:], middle_mask(64, 64))
        assert torch.equal(visits.load(none, key)[0][3:], drawn_mask(key, 64, 64))
    seen, _ = visits.masked_preview(own, 0)
    assert torch.equal(seen, visits.preview_pixels(own, 0))
    assert torch.equal(seen[0] == 127, middle_mask(64, 64)[0] > 0)

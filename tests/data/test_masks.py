"""Masks beside pictures, and as they reach the loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageDraw
from torch.nn import functional as F

from finetune.cache import loss_masks as at_hand
from finetune.cache.encode import encode
from finetune.cache.image_source import LiveImages
from finetune.config import TrainConfig
from finetune.data import companions
from finetune.data.buckets import Buckets
from finetune.data.image_folder import ImageFolder
from finetune.data.image_index import ImageIndex
from finetune.data.loader import batches, training_steps
from finetune.data.masks import weights
from finetune.data.transforms import Crop
from finetune.data.user_dataset import UserDataset
from finetune.errors import DataError, UsageError
from finetune.models.encoders import PixelEncoder
from finetune.models.loading import load_model
from finetune.recipe import fine_tune
from finetune.training.noise_prediction import NoisePrediction
from tests.small_trainer import small_batch, small_trainer


def left_half(width: int = 8, height: int = 8) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_weights_lie_where_the_picture_does() -> None:
    crop = Crop(original=(8, 8), resized=(16, 16), top_left=(0, 4), size=(16, 8))
    found = weights(left_half(), crop, False, (4, 2))
    assert found[0].round().tolist() == [[1, 0]] * 4  # columns 4 to 12 of 16: half and half
    assert weights(left_half(), crop, True, (4, 2))[0].round().tolist() == [[0, 1]] * 4
    grey = Image.new("L", (4, 4), 51)  # of another size than the picture
    assert weights(grey, crop, False, (2, 2)).flatten().tolist() == pytest.approx([0.2] * 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures with masks that show where they are red, one without, and a mask without a picture."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(4):
        size = ((96, 64), (64, 96))[number % 2]
        picture, mask = Image.new("RGB", size, "blue"), Image.new("L", size)
        box = (10 * number, 12, 10 * number + 30, 50)
        ImageDraw.Draw(picture).rectangle(box, fill="red")
        ImageDraw.Draw(mask).rectangle(box, fill="white")
        picture.save(place / f"{number}.png")
        mask.save(place / (f"{number}-masklabel.png" if number == 3 else f"{number}.mask.png"))
    Image.new("RGB", (64, 64), "red").save(place / "plain.jpg")
    Image.new("L", (64, 64), "white").save(place / "lonely.mask.png")
    return place


def test_masks_are_no_pictures_and_all_files_are_accounted_for(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    Image.new("L", (64, 64)).save(folder / "black.mask.png")
    Image.new("RGB", (64, 64)).save(folder / "broken.png")
    (folder / "broken.mask.png").write_bytes(b"no image")
    Image.new("RGB", Image.open(folder / "0.png").size).save(folder / "0.jpg")  # shares the mask of 0.png
    found = ImageFolder(folder, "a box", resolution=64)
    assert found.ids == ["0.jpg", "0.png", "1.png", "2.png", "3.png", "plain.jpg"]
    reasons = {bad.path: bad.reason for bad in found.quarantined}
    assert reasons["black.png"] == "its mask: it is black all over"
    assert "broken.mask.png: not an image" in reasons["broken.png"]
    ledger = found.ledger()
    assert (ledger.found, ledger.trained, ledger.masks, ledger.skipped) == (15, 6, 6, {"masks without an image": 1})
    assert ledger.adds_up()
    assert "masks without an image (1): lonely.mask.png" in found.notes()
    none = ImageFolder(folder, "a box", resolution=64, masks="none")
    assert (none.masked, len(none.ids), none.quarantined) == (False, 8, [])
    assert none.ledger().adds_up()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("buckets", [None, Buckets(64, 32, 128, 16)])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(folder: Path, live: bool, buckets: Buckets | None) -> None:
    pictures = ImageFolder(folder, "a box", resolution=64, random_flip=True, center_crop=False, buckets=buckets)
    encoded = encode(pictures, load_model("tiny"), live=live, cache_dir="none")
    seen = 0
    for step in training_steps(encoded, batch_size=5, steps=6):
        for batch in step:
            assert batch.mask is None or batch.mask.shape[1:] == (1, *batch.latent_params.shape[-2:])
            for row, name in enumerate(batch.ids):
                if name == "plain.jpg":
                    assert batch.mask is None or (batch.mask[row] == 1).all()
                    continue
                pixels = encoded.visits.preview_pixels(pictures.ids.index(name), int(batch.keys[row]))
                red = (pixels[0] > 127).float()[None, None]
                assert batch.mask is not None
                shown = F.interpolate(red, batch.mask.shape[-2:], mode="area")[0]
                assert (batch.mask[row] - shown).abs().max() < 0.3  # edges are interpolated
                assert (batch.mask[row] - shown).abs().mean() < 0.02
                seen += 1
    assert seen == 24


def test_people_see_what_does_not_count_in_the_dark(folder: Path) -> None:
    pictures = ImageFolder(folder, "a box", resolution=64)
    boxed = LiveImages(pictures).masked_preview(0, 0).latent_params
    assert boxed.amax((1, 2)).tolist() == [255, 0, 63]  # red is lit, blue is not
    plain = LiveImages(pictures).masked_preview(4, 0).latent_params
    assert plain[0].min() > 250


def test_an_alpha_channel_is_a_mask_where_that_is_asked_for(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), "red")
    picture.putalpha(left_half(64, 64))
    picture.save(tmp_path / "a.png")
    asked, not_asked = (ImageFolder(tmp_path, "x", resolution=64, masks=how) for how in ("files and alpha", "files"))
    assert not_asked.companion(0, "mask") is None
    mask = asked.companion(0, "mask")
    assert mask is not None
    assert np.asarray(mask)[0].tolist() == [255] * 32 + [0] * 32


def test_errors_count_where_the_mask_is_white() -> None:
    trainer = small_trainer("full")
    batch = replace(small_batch(), mask=torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5)]))
    (part,) = trainer.prepare(batch).parts
    with torch.no_grad():
        masked = trainer.objective.loss(trainer.unet, part.drawn, part.cond, None)
        whole = trainer.objective.loss(trainer.unet, replace(part.drawn, mask=None), part.cond, None)
    assert masked[0] == 0
    assert masked[1] == pytest.approx(0.5 * whole[1].item())
    pieces = [piece.mask for piece in batch.split(1)]
    assert [piece.mean().item() for piece in pieces if piece is not None] == [0, 0.5]
    assert isinstance(trainer.encoder, PixelEncoder)
    assert (
        NoisePrediction(DDPMScheduler()).sample(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64)).mask is None
    )


def test_a_run_heeds_them_and_other_masks_are_another_run(folder: Path, tmp_path: Path) -> None:
    options = {
        "data": str(folder), "prompt": "a box", "resolution": 64, "max_train_steps": 1, "rank": 2,
        "num_inference_steps": 0, "train_batch_size": 5,
    }  # fmt: skip
    losses = {}
    for name, masked in {"files": None, "none": False, "alpha": True}.items():
        out = fine_tune(TrainConfig(**options, masked_loss=masked, output_dir=str(tmp_path / name)))
        losses[name] = json.loads((out / "metrics.jsonl").read_text())["loss"]
    assert losses["files"] == losses["alpha"] < 0.6 * losses["none"]
    Image.new("L", (96, 64), "white").save(folder / "0.mask.png")
    with pytest.raises(UsageError, match="holds another run"):
        fine_tune(TrainConfig(**options, output_dir=str(tmp_path / "files")))
    table = tmp_path / "rows.parquet"
    table.write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"--masked_loss is for folders of images and shards; .*rows.parquet holds rows"
    ):
        fine_tune(TrainConfig(**options | {"data": str(table)}, masked_loss=True))


def test_masks_are_opened_once_unless_nothing_is_to_be_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = companions.open_mask
    monkeypatch.setattr(
        companions, "open_mask", lambda file, digest=None: opened.append(str(file)) or plain(file, digest)
    )

    def again(*, strict: bool = False) -> list[str]:
        opened.clear()
        memory = ImageIndex(tmp_path / "cache", strict=strict)
        return list(ImageFolder(folder, "a box", resolution=64, memory=memory).companion_digests())

    first = again()
    assert len(opened) == 4
    assert again() == first
    assert opened == []
    assert again(strict=True) == first
    assert len(opened) == 4
    Image.new("L", (96, 64), 200).save(folder / "0.mask.png")
    assert [a == b for a, b in zip(again(), first, strict=True)] == [False, True, True, True]
    assert [Path(name).name for name in opened] == ["0.mask.png"]
    Image.new("L", (96, 64)).save(folder / "0.png")  # a black picture is none of a mask's business
    Image.new("L", (96, 64)).save(folder / "0.mask.png")
    assert len(again()) == 3
    assert len(again()) == 3  # black all over, whenever it is asked


def test_a_mask_is_black_where_it_is_transparent(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    mask = Image.new("RGBA", (64, 64), "white")
    mask.putalpha(left_half(64, 64))
    mask.save(tmp_path / "a.mask.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save(tmp_path / "b.mask.png")
    found = ImageFolder(tmp_path, "x", resolution=64)
    opened = found.companion(0, "mask")
    assert opened is not None
    assert (opened.getpixel((5, 5)), opened.getpixel((60, 5))) == (255, 0)
    assert [(bad.path, bad.reason) for bad in found.quarantined] == [("b.png", "its mask: it is black all over")]


@pytest.mark.parametrize(
    ("size", "fits"), [((96, 64), True), ((48, 32), True), ((193, 128), True), ((64, 64), False), ((64, 96), False)]
)
def test_a_mask_of_another_shape_is_quarantined_with_its_picture(
    tmp_path: Path, size: tuple[int, int], fits: bool
) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    left_half(*size).save(tmp_path / "a.mask.png")
    Image.new("RGB", (96, 64), "red").save(tmp_path / "b.png")
    memory = ImageIndex(tmp_path / "cache")
    for _ in range(2):  # as new, and as remembered
        found = ImageFolder(tmp_path, "x", resolution=64, memory=memory)
        assert found.ids == (["a.png", "b.png"] if fits else ["b.png"])
        why = f"its mask has another shape: {size[0]}x{size[1]} for an image of 96x64"
        assert [bad.reason for bad in found.quarantined] == ([] if fits else [why])
        assert found.ledger().adds_up()


def test_masks_that_change_nothing_are_told(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 255).save(folder / "plain.mask.png")
    memory = ImageIndex(tmp_path / "cache")
    for _ in range(2):
        notes = ImageFolder(folder, "x", resolution=64, memory=memory).notes()
        assert "1 mask entirely white: no effect" in notes


def test_masks_at_hand_are_bounded_by_their_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_hand, "MOST", 3 * 16 * 16 * 4)
    encoded = encode(ImageFolder(folder, "a box", resolution=64), load_model("tiny"), cache_dir="none")
    for _ in training_steps(encoded, batch_size=5, steps=6):
        assert sum(mask.nbytes for mask in encoded.masks._at_hand.values() if mask is not None) <= 3 * 16 * 16 * 4


def rows_with_masks() -> list[tuple[Image.Image, str, str, dict[str, Image.Image]]]:
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("RGBA", (64, 64), "white")
    mask.putalpha(left_half(64, 64))
    return [(picture, "a", "0", {"mask": mask}), (picture, "b", "1", {})]


def test_rows_of_the_callers_own_may_bring_masks() -> None:
    tiny = load_model("tiny")
    encoded = encode(rows_with_masks(), tiny, cache_dir="none")
    assert encoded.pictures.masked
    assert [list(encoded.pictures.companions(index)) for index in (0, 1)] == [["mask"], []]
    (batch,) = batches(encoded, batch_size=2, steps=1)
    assert batch.mask is not None
    masks = dict(zip(batch.ids, batch.mask, strict=True))
    half = masks["0"].shape[-1] // 2
    assert masks["0"][..., :half].eq(1).all()
    assert masks["0"][..., half:].eq(0).all()
    assert masks["1"].eq(1).all()
    sources = [(image, text, name, {"source": image}) for image, text, name, _ in rows_with_masks()]
    assert not encode(sources, tiny, cache_dir="none").pictures.masked


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([{}, None], r"dataset\[1\] has 3 elements, dataset\[0\] has 4; expected the same of all rows"),
        ([{"mask": "a.png"}], r"dataset\[0\] is \(Image, str, str, dict\); expected \(PIL image, caption, id\)"),
        (
            [{"mask": Image.new("L", (64, 32))}],
            r"dataset\[0\]: its mask has another shape: 64x32 for an image of 64x64",
        ),
    ],
)
def test_companions_that_cannot_be_are_named(some: list[Any], message: str) -> None:
    image = Image.new("RGB", (64, 64))
    rows = [(image, "a", str(index), *([] if kinds is None else [kinds])) for index, kinds in enumerate(some)]
    with pytest.raises(DataError, match=message):
        UserDataset(rows)


def test_what_is_black_counts_a_little_and_masks_count_alike(folder: Path) -> None:
    """clamp(mask, unmasked_weight, 1), and divided by its mean, as OneTrainer has it."""
    images = ImageFolder(folder, "a box", resolution=64)
    model = load_model("tiny")
    encoded = [
        encode(images, model, cache_dir="none", mask_options=options)
        for options in ({}, {"unmasked_weight": 0.25}, {"unmasked_weight": 0.25, "normalize": True})
    ]
    plain, clamped, normalized = (next(batches(each, batch_size=5, steps=1)).mask for each in encoded)
    assert plain is not None
    assert clamped is not None
    assert normalized is not None
    assert torch.equal(clamped, plain.clamp(min=0.25))
    assert torch.allclose(normalized, clamped / clamped.mean(dim=(1, 2, 3), keepdim=True))
    assert normalized.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 5)


def test_at_a_share_of_the_visits_the_whole_image_counts(folder: Path) -> None:
    images, model = ImageFolder(folder, "a box", resolution=64), load_model("tiny")
    plain, some = (
        encode(images, model, cache_dir="none", mask_options=options) for options in ({}, {"unmasked_probability": 0.3})
    )
    whole = 0
    for before, after in zip(*(batches(each, batch_size=5, steps=40) for each in (plain, some)), strict=True):
        assert before.mask is not None
        for row in range(5):
            mask = torch.ones_like(before.mask[row]) if after.mask is None else after.mask[row]
            changed = not torch.equal(mask, before.mask[row])
            whole += changed
            assert not changed or bool((mask == 1).all())
    assert 0.2 < whole / 200 < 0.4


def test_a_run_counts_what_is_black_as_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, options in {"plain": {}, "little": {"unmasked_weight": 0.5}}.items():
        config = TrainConfig(
            data=str(folder), prompt="a box", resolution=64, max_train_steps=1, rank=2, num_inference_steps=0,
            train_batch_size=5, output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        losses.append(json.loads((fine_tune(config) / "metrics.jsonl").read_text())["loss"])
    assert losses[1] > losses[0]

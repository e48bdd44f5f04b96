"""Masks: where in a picture an error counts. White: wholly; black: not at all; grey: in proportion."""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune.data.image_checks import stamped
from finetune.data.image_index import FileStamp, ImageIndex
from finetune.data.images import PictureFile, digest_of, open_image, read_file
from finetune.data.listing import composed
from finetune.data.transforms import Crop
from finetune.errors import DataError

SUFFIXES = (".mask.png", "-masklabel.png")
"""A mask lies beside its picture: cat.mask.png beside cat.jpg, or as OneTrainer has it."""

_SUFFIX = re.compile(rf"(?<=[^/])({'|'.join(map(re.escape, SUFFIXES))})\Z", re.IGNORECASE | re.DOTALL)


def is_mask(name: str) -> bool:
    """Whether its name says that it is one."""
    return name.lower().endswith(SUFFIXES) and _SUFFIX.search(name) is not None


def without_suffix(mask: str) -> str:
    """What the name of a mask has before its ending: that of its picture, without one."""
    return _SUFFIX.sub("", mask)


Key = TypeVar("Key")


def masks_of(files: Iterable[str], pictures: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Picture -> the mask beside it; and the masks that lie beside no picture."""
    masks = [file for file in files if is_mask(file)]
    places = {composed(without_suffix(file)): file for file in masks}
    stems = ((picture, composed(os.path.splitext(picture)[0])) for picture in pictures) if masks else ()
    masked = {picture: places[stem] for picture, stem in stems if stem in places}
    used = set(masked.values())
    return masked, [file for file in masks if file not in used]


class MaskInfo(NamedTuple):
    """What is known of a mask that was opened."""

    digest: str
    """Of its file."""
    size: tuple[int, int]
    """Width and height, upright."""
    white: bool
    """All over, so that it changes nothing."""

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether it has the aspect of a picture of this width and height, to 2 %: it may be larger or smaller."""
        return abs(self.size[0] * size[1] - self.size[1] * size[0]) <= 0.02 * self.size[1] * size[0]


def checked_masks(
    masks: Mapping[Key, PictureFile], memory: ImageIndex | None = None
) -> tuple[dict[Key, MaskInfo], dict[Key, str]]:
    """Picture -> what is known of its mask, and picture -> why its mask cannot be used.

    `memory`, of earlier runs, spares the reading of masks that are unchanged, and takes up what is new.
    """
    infos, bad = {}, {}
    files, sizes = list[tuple[Path, FileStamp, str]](), list[tuple[str, tuple[int, int]]]()

    def check(file: PictureFile) -> MaskInfo:
        place = stamped(file)
        digest = memory.digest(*place) if memory is not None and place else None
        if memory is not None and digest:
            for white in (True, False):
                if size := memory.size(_as_mask(digest, white=white)):
                    return MaskInfo(digest, size, white)
        mask = open_mask(file)
        if not mask.getbbox():
            raise DataError("it is black all over")
        info = MaskInfo(digest_of(read_file(file)), mask.size, mask.getextrema()[0] == 255)
        if place:
            files.append((*place, info.digest))
            sizes.append((_as_mask(info.digest, white=info.white), mask.size))
        return info

    with ThreadPoolExecutor() as pool:
        checks = {picture: pool.submit(check, mask) for picture, mask in masks.items()}
        for picture, made in checks.items():
            try:
                infos[picture] = made.result()
            except DataError as error:
                bad[picture] = f"its mask: {error}"
    if memory is not None and files:
        memory.note(files, sizes)
    return infos, bad


def _as_mask(digest: str, *, white: bool) -> str:
    """What remembers that these bytes are a mask that can be used: a picture may be black all over."""
    return f"{'white' if white else 'grey'} mask {digest}"


def open_mask(file: PictureFile, digest: str | None = None) -> Image.Image:
    """8 bit grey, black where it is transparent. Raises DataError for what is no picture, or not of these bytes."""
    return open_image(file, digest=digest, background="black").convert("L")


def weights(mask: Image.Image, placement: Crop, flip: bool, size: tuple[int, int]) -> Tensor:
    """(1, h, w) in [0, 1] for a latent of this size: the mean of the mask over what each position stands for.

    Args:
        mask: 8 bit grey, of the picture's own shape; it is scaled to its size.
        placement, flip: of the picture.
        size: h and w.
    """
    height, width = placement.original
    resized = mask if mask.size == (width, height) else mask.resize((width, height), Image.Resampling.BILINEAR)
    return F.interpolate(placement.pixels(resized, flip)[None] / 255, size, mode="area")[0]

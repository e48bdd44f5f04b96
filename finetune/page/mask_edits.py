"""Loss masks written next to images."""

import io
from pathlib import Path

from PIL import Image

from finetune.atomic_io import is_inside, write_whole
from finetune.data.companions import SUFFIXES, has_aspect_of
from finetune.data.images import READ_ERRORS
from finetune.errors import DataError, UsageError
from finetune.page.image_set import ImageSet, image_size

_LARGEST_SIDE = 8192
"""Pixels of a mask."""


def write_mask(images: ImageSet, name: str, png: bytes) -> None:
    """Write the mask of an image, NAME.mask.png or the one that it has. The file before is kept as .FILE.before.

    Args:
        images: of the folder.
        name: of the image.
        png: the mask, white where the loss counts.

    Raises:
        UsageError: no such image, no PNG, of another shape, or black all over.
        DataError: it cannot be written.
    """
    path = _place(images, name)
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            if max(image.size) > _LARGEST_SIDE:
                raise UsageError(f"mask of {name}: {image.size}, at most {_LARGEST_SIDE} pixels a side")
            mask = image.convert("L")
    except READ_ERRORS as error:
        raise UsageError(f"mask of {name}: not a PNG") from error
    size = image_size(images.path(name))
    if size is None or not has_aspect_of(mask.size, size):
        raise UsageError(f"mask of {name}: {mask.size}, of another shape than the image")
    if not mask.getbbox():
        raise UsageError(f"mask of {name}: paint what counts; it is black all over")
    mask.save(content := io.BytesIO(), "PNG")
    try:
        _keep(path)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    images.refresh([name])


def delete_mask(images: ImageSet, name: str) -> None:
    """Delete the mask of an image; it is kept as .FILE.before. Raises UsageError and DataError as `write_mask`."""
    path = _place(images, name)
    try:
        _keep(path)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    images.refresh([name])


def _place(images: ImageSet, name: str) -> Path:
    """Where the mask of an image lies, or will lie."""
    image = images.image(name)
    path = images.folder / (image.mask or Path(name).with_suffix(SUFFIXES["mask"][0]))
    if not is_inside(path, images.folder):
        raise UsageError(f"{image.mask}: a link out of the folder")
    return path


def _keep(path: Path) -> None:
    if path.exists():
        write_whole(path.with_name(f".{path.name}.before"), path.read_bytes())

"""Thumbnails of images, kept in memory."""

from functools import lru_cache
from io import BytesIO
from pathlib import Path

from finetune.data.images import open_reduced


def thumbnail(path: Path, side: int) -> bytes:
    """A JPEG of an image, upright, whose longer side is at most `side` pixels. Raises DataError for no image."""
    return _thumbnail(path, path.stat().st_mtime_ns, side)


@lru_cache(maxsize=1024)
def _thumbnail(path: Path, changed: int, side: int) -> bytes:
    _, small = open_reduced(path, side)
    small.thumbnail((side, side))
    small.save(file := BytesIO(), "JPEG", quality=85)
    return file.getvalue()

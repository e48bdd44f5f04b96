"""Companions: image files that belong to a picture and are cropped and mirrored with it, such as its mask."""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from finetune.data.image_checks import stamped
from finetune.data.image_index import FileStamp, ImageIndex
from finetune.data.images import PictureFile, digest_of, open_image, open_mask, read_file
from finetune.data.listing import composed, is_picture
from finetune.errors import DataError

SUFFIXES: Mapping[str, tuple[str, ...]] = {"mask": (".mask.png", "-masklabel.png")}
"""Kind -> endings of its files: cat.mask.png belongs to cat.jpg, and so does cat-masklabel.png of OneTrainer."""

_ALL_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_SUFFIX = re.compile(rf"(?<=[^/])({'|'.join(map(re.escape, _ALL_SUFFIXES))})\Z", re.IGNORECASE | re.DOTALL)


def companion_kind(name: str) -> str | None:
    """Return the kind of companion that a file's name says it is; None: it is no companion."""
    lower = name.lower()
    if not lower.endswith(_ALL_SUFFIXES) or _SUFFIX.search(name) is None:
        return None
    return next(kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes))


def pictures_among(files: Iterable[str]) -> list[str]:
    """Return the files that are pictures to train on."""
    return [file for file in files if is_picture(file) and companion_kind(file) is None]


def without_suffix(companion: str) -> str:
    """Return a companion's name without its ending: the name of its picture without an extension."""
    return _SUFFIX.sub("", companion)


Key = TypeVar("Key")


def companions_of(files: Iterable[str], pictures: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return picture -> kind -> the companion beside it, and the companions that lie beside no picture."""
    kinds = {file: kind for file in files if (kind := companion_kind(file))}
    places = {(composed(without_suffix(file)), kind): file for file, kind in kinds.items()}
    stems = ((picture, composed(os.path.splitext(picture)[0])) for picture in pictures) if kinds else ()
    found = dict[str, dict[str, str]]()
    for picture, stem in stems:
        if some := {kind: places[stem, kind] for kind in SUFFIXES if (stem, kind) in places}:
            found[picture] = some
    used = {file for some in found.values() for file in some.values()}
    return found, [file for file in kinds if file not in used]


class CompanionInfo(NamedTuple):
    """What is known of a companion that was opened."""

    digest: str
    """Digest of its file."""
    size: tuple[int, int]
    """Width and height, upright."""
    white: bool = False
    """Whether it is a mask that is white all over, so that it changes nothing."""


def has_aspect_of(companion: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Whether two widths and heights have the same aspect, to 2 %: a companion may be larger or smaller."""
    return abs(companion[0] * picture[1] - companion[1] * picture[0]) <= 0.02 * companion[1] * picture[0]


def checked_companions(
    companions: Mapping[Key, Mapping[str, PictureFile]], memory: ImageIndex | None = None
) -> tuple[dict[Key, dict[str, CompanionInfo]], dict[Key, str]]:
    """Open all companions.

    Args:
        companions: picture -> kind -> file.
        memory: index of earlier runs; unchanged files that it knows are not read again, and new ones are added to it.

    Returns:
        Picture -> kind -> what is known of its companion, and picture -> why a companion cannot be used.
    """
    infos, bad = dict[Key, dict[str, CompanionInfo]](), dict[Key, str]()
    files, sizes = list[tuple[Path, FileStamp, str]](), list[tuple[str, tuple[int, int]]]()

    def check(kind: str, file: PictureFile) -> CompanionInfo:
        place = stamped(file)
        digest = memory.digest(*place) if memory is not None and place else None
        if memory is not None and digest and (remembered := _remembered(kind, digest, memory)):
            return remembered
        info = _opened(kind, file)
        if place:
            files.append((*place, info.digest))
            sizes.append((_index_name(kind, info.digest, white=info.white), info.size))
        return info

    with ThreadPoolExecutor() as pool:
        checks = [
            (picture, kind, pool.submit(check, kind, file))
            for picture, some in companions.items()
            for kind, file in some.items()
        ]
        for picture, kind, checked in checks:
            try:
                infos.setdefault(picture, {})[kind] = checked.result()
            except DataError as error:
                bad[picture] = f"its {kind}: {error}"
    if memory is not None and files:
        memory.note(files, sizes)
    return infos, bad


def _opened(kind: str, file: PictureFile) -> CompanionInfo:
    if kind != "mask":
        image = open_image(file)
        return CompanionInfo(digest_of(read_file(file)), image.size)
    mask = open_mask(file)
    if not mask.getbbox():
        raise DataError("it is black all over")
    return CompanionInfo(digest_of(read_file(file)), mask.size, mask.getextrema()[0] == 255)


def _remembered(kind: str, digest: str, memory: ImageIndex) -> CompanionInfo | None:
    for white in (True, False):
        if size := memory.size(_index_name(kind, digest, white=white)):
            return CompanionInfo(digest, size, white)
    return None


def _index_name(kind: str, digest: str, *, white: bool) -> str:
    """What the index calls a companion that can be used: the same bytes may be a picture, and a mask not be usable."""
    return f"{'white' if white else 'grey'} {kind} {digest}"

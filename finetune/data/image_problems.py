"""Images of a folder that are worth a look before training: unreadable, small, blurred, or shown twice."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from finetune.data.captions import find_captions
from finetune.data.companions import checked_companions, companions_of, pictures_among
from finetune.data.images import READ_ERRORS, digest_of, open_reduced, read_file, reason_of
from finetune.data.listing import files_inside, list_files
from finetune.data.near_duplicates import Thumbnail, make_thumbnail, near_duplicates
from finetune.errors import DataError

MOST_COMPARED = 2000
"""Images among which near duplicates are looked for; of more, only those with the same bytes are found."""

_SIDE = 512
"""Pixels of the longer side at which sharpness is measured."""
_TILES = 8
_SHARP = 8.0
"""Sharpness, see `_sharpness`, below which an image looks blurred. 64 photographs had 19 to 119, and 2.7 to 9.6 after
a Gaussian blur of 0.3 % of their longer side.
"""

Kind = Literal["unreadable", "caption", "mask", "small", "blurred", "copy"]


class ImageProblem(NamedTuple):
    """Something about an image that is worth a look."""

    image: str
    """Path relative to the folder."""
    kind: Kind
    text: str


class _Measurement(NamedTuple):
    size: tuple[int, int]
    digest: str
    sharpness: float
    thumbnail: Thumbnail


def find_problems(folder: Path, resolution: int, *, follow_links: bool = True) -> list[ImageProblem]:
    """Look at every image of a folder.

    Args:
        folder: of images, at any depth.
        resolution: pixels per side that training uses; images with a smaller area are small.
        follow_links: whether to look at what links out of the folder lead to.

    Returns:
        The problems, in the order of the images' names.

    Raises:
        DataError: a folder cannot be listed, or a metadata file is malformed.
    """
    files = list_files(folder) if follow_links else files_inside(folder)
    names = pictures_among(files)
    captions = find_captions(folder, files, names)
    masks = {name: {kind: folder / file for kind, file in some.items()}
             for name, some in companions_of(files, names)[0].items()}  # fmt: skip
    problems = [ImageProblem(name, "caption", f"its caption: {text}") for name, text in captions.unreadable.items()]
    problems += [ImageProblem(name, "mask", text) for name, text in checked_companions(masks)[1].items()]
    measured = dict[str, _Measurement]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measurements = pool.map(lambda name: _measure(folder / name), names)
        for name, measurement in tqdm(
            zip(names, measurements, strict=True), "looking at images", len(names), delay=3, leave=False, disable=None
        ):
            if isinstance(measurement, str):
                problems.append(ImageProblem(name, "unreadable", measurement))
            else:
                measured[name] = measurement
    for name, measurement in measured.items():
        problems += _alone(name, measurement, resolution)
    problems += _copies(list(measured), list(measured.values()))
    places = {name: place for place, name in enumerate(names)}
    return sorted(problems, key=lambda problem: places[problem.image])


def _measure(path: Path) -> _Measurement | str:
    """What is known of an image; why it cannot be read otherwise."""
    try:
        content = read_file(path)
        size, image = open_reduced(io.BytesIO(content), _SIDE)
    except DataError as error:
        return str(error)
    except READ_ERRORS as error:
        return reason_of(error)
    return _Measurement(size, digest_of(content), _sharpness(image), make_thumbnail(image))


def _sharpness(image: Image.Image) -> float:
    """How sharp the sharpest parts are: the 95th percentile, over 8 x 8 tiles, of the standard deviation of the
    Laplacian of the grey image at 512 pixels (Pech-Pacheco et al. 2000). A blurred background does not count.
    """
    grey = image.convert("L")
    scale = _SIDE / max(grey.size)
    if scale < 1:
        size = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
        grey = grey.resize(size, Image.Resampling.BOX)
    values = np.asarray(grey, np.float32)
    if max(values.shape) < _SIDE // 2:
        return _SHARP  # too small to say
    laplacian = values[1:-1, :-2] + values[1:-1, 2:] + values[:-2, 1:-1] + values[2:, 1:-1] - 4 * values[1:-1, 1:-1]
    tiles = [tile.std() for row in np.array_split(laplacian, _TILES) for tile in np.array_split(row, _TILES, axis=1)]
    return float(np.percentile(tiles, 95))


def _alone(name: str, measurement: _Measurement, resolution: int) -> list[ImageProblem]:
    """What an image by itself is noticed for."""
    (width, height), problems = measurement.size, list[ImageProblem]()
    if width * height < resolution**2:
        text = f"{width} x {height} pixels, less than {resolution} x {resolution}"
        problems.append(ImageProblem(name, "small", text))
    if measurement.sharpness < _SHARP:
        problems.append(ImageProblem(name, "blurred", "looks blurred"))
    return problems


def _copies(names: Sequence[str], measurements: Sequence[_Measurement]) -> list[ImageProblem]:
    """Images that show what an earlier one shows."""
    first, problems = dict[str, str](), list[ImageProblem]()
    different = list[int]()
    for place, (name, measurement) in enumerate(zip(names, measurements, strict=True)):
        if measurement.digest in first:
            problems.append(ImageProblem(name, "copy", f"the same file as {first[measurement.digest]}"))
        else:
            first[measurement.digest] = name
            different.append(place)
    if 1 < len(different) <= MOST_COMPARED:
        thumbnails = [measurements[place].thumbnail for place in different]
        for place, others in enumerate(near_duplicates(thumbnails, range(len(different)))):
            if earlier := [other for other in others if other < place]:
                original = names[different[min(earlier)]]
                problems.append(ImageProblem(names[different[place]], "copy", f"shows the same as {original}"))
    return problems

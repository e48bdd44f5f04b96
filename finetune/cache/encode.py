"""Pictures through the encoder and captions through the conditioner, each once."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from finetune import seeding
from finetune.batch import map_tensors
from finetune.cache.encoded import Encoded
from finetune.cache.visits import Kept, Live, pixels_of, wants_flips
from finetune.data.own import Rows, as_pictures
from finetune.data.pictures import Pictures
from finetune.data.transforms import normalize
from finetune.errors import DataError
from finetune.models.encoders import Encoder
from finetune.models.loading import DiffusionModel

T = TypeVar("T")


def encode(
    dataset: Pictures | Rows,
    model: DiffusionModel,
    *,
    live: bool = False,
    caption_dropout: float = 0.0,
    seed: int = 0,
) -> Encoded:
    """Make a dataset ready for training: each picture and each distinct caption is encoded once.

    Flips keep two encodings; a random crop is drawn once per picture. With `live`, pictures are encoded at each
    visit instead, with crop and flip drawn anew. What is no longer needed leaves the device: the text encoder, and the
    VAE unless `live`.

    Args:
        dataset: an ImageFolder, a HuggingFaceDataset, or any map-style dataset of (image, caption, id).
        model: its encoder and conditioner are used, on the device where they are.
        live: encode pictures at every visit.
        caption_dropout: share of visits that get an empty caption, in [0, 1).
        seed: of the crops that are drawn once.

    Raises:
        DataError: two pictures share an id, or an encoding is not finite.
    """
    pictures = as_pictures(dataset)
    conditions = _each_once(
        "caption",
        [*pictures.captions, ""],
        lambda caption: map_tensors(lambda tensor: tensor.cpu(), model.conditioner.encode([caption])),
    )
    model.conditioner.to("cpu")
    visits = Live(pictures)
    if not live:
        places = {name: index for index, name in enumerate(pictures.ids)}
        rows = _each_once(
            "picture", pictures.ids, lambda name: _encode_picture(pictures, places[name], model.encoder, seed)
        )
        visits = Kept([stored for stored, _ in rows.values()], [geometry for _, geometry in rows.values()])
        model.encoder.to("cpu")
    return Encoded(
        ids=pictures.ids,
        captions=pictures.captions,
        visits=visits,
        encoder=model.encoder if live else None,
        conditioner=model.conditioner,
        conditions=conditions,
        caption_dropout=caption_dropout,
    )


def _each_once(what: str, names: Iterable[str], encode: Callable[[str], T]) -> dict[str, T]:
    """Each distinct name with what `encode` makes of it, in the order in which they come first."""
    distinct = list(dict.fromkeys(names))
    bar = tqdm(distinct, desc=f"encoding {what}s", unit=what, delay=3, leave=False)
    return {name: encode(name) for name in bar}


def _encode_picture(pictures: Pictures, index: int, encoder: Encoder, seed: int) -> tuple[Tensor, Tensor]:
    """A picture's encodings (F, C, h, w), F = 2 with its mirror image where flips are wanted; their geometry (F, 6)."""
    name = pictures.ids[index]
    key, flips = seeding.example_key(seed, name, 0), (False, True) if wants_flips(pictures) else (False,)
    pixels, geometries = zip(*[pixels_of(pictures, index, key, flip) for flip in flips], strict=True)
    stored = encoder.encode(normalize(torch.stack(pixels))).cpu()
    if not stored.float().isfinite().all():
        raise DataError(f"{name}: its encoding is not finite")
    return stored, torch.stack(geometries)

"""Pictures through the encoder and captions through the conditioner, once; then ready to be visited."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

from finetune import seeding
from finetune.batch import Batch, map_tensors
from finetune.data.images import to_rgb
from finetune.data.transforms import Preprocess, normalize
from finetune.errors import DataError
from finetune.models.conditioners import Conditioner
from finetune.models.encoders import Encoder
from finetune.models.loading import DiffusionModel


class Pictures(Protocol):
    """What can be encoded: any map-style dataset of (image, caption, id).

    `image` is a PIL picture; a dataset with a `transform` (Preprocess) has it applied, one without gives pictures
    of one size that the model can take. `ids` and `captions`, where a dataset has them, spare opening the pictures.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, str, str]: ...


@dataclass(frozen=True)
class Kept:
    """Visits to encodings that are held in memory."""

    stored: Sequence[Tensor]
    """Per picture (F, C, h, w): F = 1, or 2 where flips are wanted (as it is, mirrored)."""
    geometry: Sequence[Tensor]

    def load(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """The stored encoding (C, h, w), mirrored half of the time if flips are kept, and its geometry (6,)."""
        versions = self.stored[index]
        return versions[int(len(versions) > 1 and _flipped(key))], self.geometry[index]


@dataclass(frozen=True)
class Live:
    """Visits to the pictures themselves; crop and flip are drawn anew each time."""

    pictures: Pictures

    def load(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """Pixels (3, H, W) uint8 and geometry (6,)."""
        return _pixels(self.pictures, index, key, flip=_wants_flips(self.pictures) and _flipped(key))


@dataclass(frozen=True)
class Encoded:
    """A dataset ready to be visited: `batches` draws from it."""

    ids: Sequence[str]
    captions: Sequence[str]
    visits: Kept | Live
    """The part that worker processes get a copy of."""
    encoder: Encoder | None
    """Encodes at each visit; None where encodings are kept."""
    conditioner: Conditioner
    conditions: Mapping[str, Mapping[str, Any]]
    """Distinct caption -> what the conditioner stored for it, first size 1."""
    caption_dropout: float

    def __len__(self) -> int:
        return len(self.ids)

    def assemble(self, indices: Sequence[int], keys: Tensor, loaded: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Loaded visits -> Batch on the CPU. Raises DataError when the pictures differ in size."""
        ids = tuple(self.ids[index] for index in indices)
        stored = _stack([row[0] for row in loaded], ids)
        if self.encoder is not None:
            stored = self.encoder.encode(normalize(stored)).cpu()
        geometry = torch.stack([row[1] for row in loaded])
        dropped = (seeding.uniform(keys, "caption dropout") < self.caption_dropout).tolist()
        captions = ["" if drop else self.captions[i] for i, drop in zip(indices, dropped, strict=True)]
        rows = [self.conditions[caption] for caption in captions]
        together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        cond = self.conditioner.kwargs(together, geometry)
        return Batch(stored, cond, keys, geometry, ids, torch.ones(len(ids)))


def encode(
    pictures: Pictures,
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
        pictures: an ImageFolder, a HuggingFaceDataset, or any map-style dataset of (image, caption, id).
        model: its encoder and conditioner are used, on the device where they are.
        live: encode pictures at every visit.
        caption_dropout: share of visits that get an empty caption, in [0, 1).
        seed: of the crops that are drawn once.

    Raises:
        DataError: two pictures share an id, or an encoding is not finite.
    """
    ids, captions = names_and_captions(pictures)
    conditions = _encode_captions([*captions, ""], model.conditioner)
    model.conditioner.to("cpu")
    if live:
        return Encoded(ids, captions, Live(pictures), model.encoder, model.conditioner, conditions, caption_dropout)
    kept = _encode_pictures(pictures, ids, model.encoder, seed)
    model.encoder.to("cpu")
    return Encoded(ids, captions, kept, None, model.conditioner, conditions, caption_dropout)


def as_batch(model: DiffusionModel, pixels: Tensor, prompts: Sequence[str] = (), *, step: int, seed: int = 0) -> Batch:
    """A Batch from a data loader of your own: encodes what it is given, here and now.

    Args:
        model: its encoder and conditioner are used.
        pixels: (B, 3, H, W) in [-1, 1], as the tutorial's `Normalize([0.5], [0.5])` gives.
        prompts: B captions; none in pixel mode.
        step: of your loop; every draw is a function of seed, step and row, so it must change from call to call.
    """
    ids = tuple(f"step {step} row {row}" for row in range(len(pixels)))
    keys = torch.tensor([seeding.example_key(seed, name, 0) for name in ids])
    height, width = pixels.shape[-2:]
    geometry = torch.tensor([[height, width, 0, 0, height, width]] * len(ids))
    cond = model.conditioner.kwargs(model.conditioner.encode(prompts), geometry) if prompts else {}
    return Batch(model.encoder.encode(pixels), cond, keys, geometry, ids, torch.ones(len(ids))).to(model.unet.device)


def _encode_pictures(pictures: Pictures, ids: Sequence[str], encoder: Encoder, seed: int) -> Kept:
    stored: list[Tensor] = []
    geometries: list[Tensor] = []
    for index in tqdm(range(len(ids)), desc="encoding pictures", unit="picture", delay=3, leave=False):
        crop_key = seeding.example_key(seed, ids[index], 0)
        pixels, geometry = _pixels(pictures, index, crop_key, flip=False)
        versions = [pixels, functional.horizontal_flip(pixels)] if _wants_flips(pictures) else [pixels]
        encoding = encoder.encode(normalize(torch.stack(versions))).cpu()
        if not encoding.float().isfinite().all():
            raise DataError(f"{ids[index]}: its encoding is not finite")
        stored.append(encoding)
        geometries.append(geometry)
    return Kept(stored, geometries)


def _encode_captions(captions: Iterable[str], conditioner: Conditioner) -> dict[str, Mapping[str, Any]]:
    distinct = sorted(set(captions))
    return {
        caption: map_tensors(lambda tensor: tensor.cpu(), conditioner.encode([caption]))
        for caption in tqdm(distinct, desc="encoding captions", unit="caption", delay=3, leave=False)
    }


def names_and_captions(pictures: Pictures) -> tuple[list[str], list[str]]:
    """Ids and captions of all pictures, in order. Raises DataError when an id stands for two pictures."""
    ids, captions = getattr(pictures, "ids", None), getattr(pictures, "captions", None)
    if ids is None or captions is None:
        rows = [pictures[index][1:] for index in range(len(pictures))]
        captions, ids = [caption for caption, _ in rows], [name for _, name in rows]
    doubled = [name for name, count in Counter(ids).items() if count > 1]
    if doubled:
        raise DataError(f"two pictures have the id {doubled[0]!r}")
    return list(ids), list(captions)


def _pixels(pictures: Pictures, index: int, key: int, flip: bool) -> tuple[Tensor, Tensor]:
    """One picture, preprocessed: pixels (3, H, W) uint8 and geometry (6,)."""
    image = pictures[index][0]
    if image.mode != "RGB":  # those that are come upright from our own datasets
        image = to_rgb(image)
    transform: Preprocess | None = getattr(pictures, "transform", None)
    if transform is not None:
        return transform(image, key, flip)
    pixels = functional.pil_to_tensor(image)
    if flip:
        pixels = functional.horizontal_flip(pixels)
    height, width = pixels.shape[-2:]
    return pixels, torch.tensor([height, width, 0, 0, height, width])


def _wants_flips(pictures: Pictures) -> bool:
    transform = getattr(pictures, "transform", None)
    return transform is not None and transform.random_flip


def _flipped(key: int) -> bool:
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)


def _stack(tensors: Sequence[Tensor], ids: Sequence[str]) -> Tensor:
    sizes = {tuple(tensor.shape) for tensor in tensors}
    if len(sizes) > 1:
        raise DataError(f"pictures of one batch differ in size: {', '.join(ids)}; give the dataset a transform")
    return torch.stack(list(tensors))

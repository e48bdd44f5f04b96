"""encode: images through the encoder and captions through the conditioner, each content once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.cache.buffered_store import BufferedStore
from finetune.cache.disk import open_store
from finetune.cache.encode_loop import EncodeJob, EncodeStats, encode_missing
from finetune.cache.encoded_dataset import CachedTextEmbeddings, EncodedDataset, LiveTextEmbeddings
from finetune.cache.image_source import CachedImages, LiveImages
from finetune.cache.lazy_encoder import LazyEncoder
from finetune.cache.store import Item
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.image_dataset import ImageDataset
from finetune.data.transforms import normalize
from finetune.data.user_dataset import MapDataset, as_pictures
from finetune.deprecation import renamed_arguments
from finetune.errors import DataError
from finetune.models.conditioners import Conditioner
from finetune.models.encoders import Encoder
from finetune.models.loading import DiffusionModel, Frozen
from finetune.models.tensor_file import DTYPES


@renamed_arguments(at_most="time_budget")
def encode(
    dataset: ImageDataset | MapDataset,
    model: DiffusionModel | Frozen,
    *,
    live: bool = False,
    captioning: CaptionAugmentation = CaptionAugmentation(),  # noqa: B008 # frozen
    seed: int = 0,
    cache_dir: str | Path | None = None,
    precision: str = "fp32",
    any_environment: bool = False,
    mask_options: Mapping[str, Any] | None = None,
    visited: Iterable[tuple[int, int | None]] | None = None,
    time_budget: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EncodedDataset:
    """Make a dataset ready for training: what is not encoded yet, by an earlier run or another process, is encoded.

    Encodings are known by their content: by the picture's bytes, the part of it that is trained, the VAE and the number
    format; by the caption and the text encoders; and by the device, threads and libraries that computed them. Flips
    keep two encodings; a random crop is drawn once per picture.
    With `live`, pictures are encoded at each visit instead, with crop and flip drawn again; so are captions that are
    shuffled. What is no longer needed leaves the device.

    Args:
        dataset: an ImageFolder, a HuggingFaceDataset, or any map-style dataset of (image, caption, id).
        model: its encoder and conditioner are used, on the device where they are.
        live: encode pictures at every visit.
        captioning: how the caption of a visit comes from those of its picture.
        seed: of the crops that are drawn once.
        cache_dir: where encodings are kept. None: `finetune-unet` in the user's cache folder; "none": in memory alone.
        precision: number format in which encodings are kept: "fp32", "fp16" or "bf16".
        any_environment: also use what other devices, numbers of threads or library versions have computed; the bits
            then depend on what the folder holds.
        mask_options: arguments of `LossMasks`.
        visited: the visits to come, in order: number of the picture, and key or None, for any. None: any, to all.
        at_most: seconds that pictures may take, and captions. What would take longer is encoded when a visit comes to
            it, for which the encoder stays on its device. None: everything is encoded now.
        on_progress: called after each encoding with what is encoded, how many are, and of how many.

    Raises:
        DataError: two pictures share an id, one has changed since it was opened, or an encoding is not finite.
        UsageError: the cache folder cannot be used.
        RunError: it cannot be written (any more).
    """
    pictures = as_pictures(dataset)
    planned = [(index, None) for index in range(len(pictures))] if visited is None else list(visited)
    store = BufferedStore(open_store(cache_dir))
    works, conditions = list[EncodeJob](), LiveTextEmbeddings(model.conditioner)
    captionings = {pictures.captioning(index, captioning) for index in range(len(pictures))}
    if not any(each.varies for each in captionings):
        conditions = CachedTextEmbeddings(
            store, model.conditioner, precision, _maker(model.conditioner, any_environment)
        )

        def captions_of(index: int) -> list[str]:
            augmentation = pictures.captioning(index, captioning)
            return [*map(augmentation.plain, pictures.texts(index)), ""]

        works.append(_captions(conditions, captions_of, [index for index, _ in planned]))
    visits: CachedImages | LiveImages = LiveImages(pictures, model.image_condition)
    if not live:
        maker = _maker(model.encoder, any_environment)
        visits = CachedImages(
            store=store,
            pictures=pictures,
            encoder=maker,
            precision=precision,
            seed=seed,
            condition=model.image_condition,
        )
        works.append(_pictures(visits, model.encoder, planned))
    made = _filled(store, works, time_budget, on_progress)
    lazy_encoders = [LazyEncoder(store, work) for work, done in zip(works, made, strict=True) if done.left]
    return EncodedDataset(
        pictures=pictures,
        shapes=pictures.shapes(),
        visits=visits,
        encoder=model.encoder,
        conditioner=model.conditioner,
        conditions=conditions,
        captioning=captioning,
        made=made,
        store=store,
        mask_options=mask_options or {},
        lazy_encoders=lazy_encoders,
    )


def _filled(
    store: BufferedStore,
    works: Sequence[EncodeJob],
    time_budget: float | None,
    on_progress: Callable[[str, int, int], None] | None,
) -> list[EncodeStats]:
    made = list[EncodeStats]()
    with closing(store):  # or what was claimed would stay so
        for work in works:
            made.append(encode_missing(store, work, time_budget, on_progress))
            if not made[-1].left:
                work.network.to("cpu")
    return made


def _maker(network: Encoder | Conditioner, any_environment: bool) -> str:
    """What made an encoding: the network, and where it ran unless that is of no interest."""
    exact = any_environment or not network.environment
    return network.fingerprint if exact else f"{network.fingerprint} on {network.environment}"


def _captions(
    conditions: CachedTextEmbeddings, captions_of: Callable[[int], Sequence[str]], indices: Iterable[int]
) -> EncodeJob:
    """The captions that visits of pictures may show, through their conditioner."""
    conditioner = conditions.conditioner
    texts = dict.fromkeys([*[text for index in dict.fromkeys(indices) for text in captions_of(index) if text], ""])
    texts_by_key = {conditions.key(text): text for text in texts}

    def keys_of(index: int, _: int) -> list[str]:
        return [conditions.key(text) for text in captions_of(index)]

    def compute(_: Sequence[str], captions: Sequence[str]) -> list[Item]:
        stored = {name: _rounded(tensor, conditions.precision) for name, tensor in conditioner.encode(captions).items()}
        return [
            {name: tensor[row : row + 1].clone() for name, tensor in stored.items()} for row in range(len(captions))
        ]

    return EncodeJob(
        kind="caption",
        keys=list(texts_by_key),
        keys_of=keys_of,
        prepare=texts_by_key.__getitem__,
        compute=compute,
        batch_size=lambda _: conditioner.batch_size,
        network=conditioner,
    )


def _pictures(images: CachedImages, encoder: Encoder, visits: Iterable[tuple[int, int | None]]) -> EncodeJob:
    """The pictures, in each variant that visits need, through the encoder."""
    variants = {
        cache_key: (index, variant) for index, key in visits for cache_key, variant in images.keys(index, key).items()
    }

    def keys_of(index: int, key: int) -> list[str]:
        return list(images.keys(index, key))

    def prepare(key: str) -> Tensor:
        return images.pixels(*variants[key])

    def batch_size(pixels: Tensor) -> int:
        return encoder.batch_size(pixels.shape[-2], pixels.shape[-1])

    def compute(keys: Sequence[str], pixels: Sequence[Tensor]) -> list[Item]:
        batch = torch.stack(list(pixels))
        whole, condition = normalize(batch[:, :3]), batch[:, 3:]
        if images.condition is None or not condition.shape[1]:
            stored = {"stored": encoder.encode(whole).cpu()}
        else:
            stored = images.condition.encode(encoder, whole, condition)
        items: list[Item] = [{name: tensor[row] for name, tensor in stored.items()} for row in range(len(batch))]
        for key, item in zip(keys, items, strict=True):
            if not all(tensor.float().isfinite().all() for tensor in item.values()):
                raise DataError(f"{images.pictures.ids[variants[key][0]]}: its encoding is not finite")
        return [{name: _rounded(tensor, images.precision).clone() for name, tensor in item.items()} for item in items]

    return EncodeJob(
        kind="picture",
        keys=list(variants),
        keys_of=keys_of,
        prepare=prepare,
        compute=compute,
        batch_size=batch_size,
        network=encoder,
    )


def _rounded(tensor: Tensor, precision: str) -> Tensor:
    """On the CPU, floats in the number format that is kept."""
    return tensor.to("cpu", DTYPES[precision] if tensor.is_floating_point() else tensor.dtype)

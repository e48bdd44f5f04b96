"""EncodedDataset: a dataset whose images and captions are encoded, and its collate function."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetune import seeding
from finetune.batch import Batch
from finetune.cache.encode_loop import EncodeStats
from finetune.cache.image_source import CachedImages, LiveImages, LoadedImage
from finetune.cache.keys import caption_key
from finetune.cache.lazy_encoder import LazyEncoder
from finetune.cache.loss_masks import LossMasks
from finetune.cache.store import Item, Store
from finetune.data.caption_augmentation import CaptionAugmentation, RunProgress
from finetune.data.image_dataset import ImageDataset
from finetune.data.sampler import Turns
from finetune.data.transforms import normalize
from finetune.errors import DataError, UsageError
from finetune.models.conditioners import Conditioner
from finetune.models.encoders import Encoder
from finetune.models.loading import DiffusionModel


class CachedTextEmbeddings:
    """What the conditioner has stored for captions, read from a store; the last few stay at hand.

    Args:
        store: where it is.
        conditioner: what made it.
        precision: number format that is kept.
        maker: the conditioner in its keys: fingerprint and environment.
    """

    MOST = 64
    """Captions at hand: with one prompt for all pictures, nothing is read twice."""

    def __init__(self, store: Store, conditioner: Conditioner, precision: str, maker: str) -> None:
        self.store, self.precision, self.conditioner, self.maker = store, precision, conditioner, maker
        self._at_hand: OrderedDict[str, Item] = OrderedDict()

    def key(self, caption: str) -> str:
        """Return the cache key of a caption's embedding."""
        return caption_key(caption, self.maker, self.precision)

    def get(self, captions: Sequence[str]) -> Item:
        """Tensors of first size B, floats as fp32."""
        rows = [self._row(caption) for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _row(self, caption: str) -> Item:
        item = self._at_hand.get(caption)  # in one go: another thread may be here too
        if item is None:
            (stored,) = self.store.load([self.key(caption)])
            item = self._at_hand[caption] = {name: tensor.float() for name, tensor in stored.items()}
            if len(self._at_hand) > self.MOST:
                self._at_hand.popitem(last=False)
        return item


@dataclass(frozen=True)
class LiveTextEmbeddings:
    """Captions encoded at each visit, where there are too many different ones to keep."""

    conditioner: Conditioner

    def get(self, captions: Sequence[str]) -> Item:
        """Tensors of first size B, floats as fp32."""
        return {name: tensor.cpu().float() for name, tensor in self.conditioner.encode(captions).items()}


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """A dataset ready to be visited: `batches` draws from it."""

    pictures: ImageDataset
    shapes: Sequence[int]
    """Of each example; what has the same one can be computed together."""
    visits: CachedImages | LiveImages
    """The part that worker processes get a copy of."""
    encoder: Encoder
    """The model's; visits need it only where pictures are live."""
    conditioner: Conditioner
    conditions: CachedTextEmbeddings | LiveTextEmbeddings
    captioning: CaptionAugmentation
    made: Sequence[EncodeStats]
    """How much of it was encoded for this, and how much was there."""
    store: Store
    """Of all that is kept."""
    mask_options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `LossMasks`."""
    lazy_encoders: Sequence[LazyEncoder] = ()
    """What is encoded when a visit comes to it."""

    @cached_property
    def masks(self) -> LossMasks:
        """The loss masks of the pictures."""
        return LossMasks(self.pictures, **self.mask_options)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def live(self) -> bool:
        """Whether a visit needs an encoder, which nothing else can use meanwhile."""
        cached = isinstance(self.visits, CachedImages) and isinstance(self.conditions, CachedTextEmbeddings)
        return not cached or any(not lazy_encoder.done for lazy_encoder in self.lazy_encoders)

    def uses(self, network: Encoder | Conditioner | None) -> bool:
        """Whether visits to come need it: it stays on its device."""
        if any(lazy_encoder.work.network is network and not lazy_encoder.done for lazy_encoder in self.lazy_encoders):
            return True
        live_text = isinstance(self.conditions, LiveTextEmbeddings) and network is self.conditioner
        return live_text or (isinstance(self.visits, LiveImages) and network is self.encoder)

    def ensure_encoded(self, visits: Sequence[tuple[int, int]]) -> None:
        """Encode what these visits, number of the example and key of each, need, and nothing has encoded yet."""
        for lazy_encoder in self.lazy_encoders:
            if not lazy_encoder.done:
                lazy_encoder.encode_for(visits)

    def close(self) -> None:
        """Keep what was encoded last; nothing more is going to be visited."""
        for lazy_encoder in self.lazy_encoders:
            lazy_encoder.close()
        self.store.close()

    @property
    def ids(self) -> Sequence[str]:
        return self.pictures.ids

    @property
    def captions(self) -> Sequence[str]:
        """The first of each picture."""
        return self.pictures.captions

    @property
    def repeats(self) -> Sequence[int]:
        """How many times each picture comes in an epoch."""
        return self.pictures.repeats

    @property
    def turns(self) -> Sequence[Turns]:
        """Groups of pictures that take turns, whatever their repeats, each with its visits in an epoch."""
        return self.pictures.turns

    @property
    def weights(self) -> Sequence[float]:
        """How much each counts in the loss of a step, beside the others."""
        return self.pictures.weights

    @property
    def epoch_visits(self) -> int:
        """Visits of an epoch."""
        return self.pictures.epoch_visits

    def caption(self, index: int, key: int, progress: RunProgress | None = None) -> str:
        """The caption of the visit with this sample key."""
        return self.pictures.captioning(index, self.captioning).caption(self.pictures.texts(index), key, progress)

    def collate(
        self,
        indices: Sequence[int],
        keys: Tensor,
        loaded: Sequence[LoadedImage],
        progress: RunProgress | None = None,
    ) -> Batch:
        """Loaded visits -> Batch on the CPU. Raises DataError when the pictures differ in size."""
        ids = tuple(self.ids[index] for index in indices)
        latent_params = _stack([image.latent_params for image in loaded], ids)
        condition = {name: _stack([image.condition[name] for image in loaded], ids) for name in loaded[0].condition}
        if isinstance(self.visits, LiveImages):
            latent_params, condition = self._encoded(latent_params, condition)
        shown = self.visits.condition
        unet_channels = None if shown is None else shown.channels(self.encoder, condition, keys)
        time_ids = torch.tensor([image.crop.time_ids(image.flip) for image in loaded])
        visits = zip(indices, keys.tolist(), strict=True)
        captions = [self.caption(index, key, progress) for index, key in visits]
        cond = self.conditioner.kwargs(self.conditions.get(captions), time_ids)
        weight = torch.tensor([self.pictures.weights[index] for index in indices])
        is_class_image = tuple(index >= self.pictures.num_subject_images for index in indices)
        size = latent_params.shape[-2], latent_params.shape[-1]
        masked = shown is None or shown.companion != "mask"  # or the mask says what the UNet is shown
        return Batch(
            latent_params=latent_params,
            cond=cond,
            keys=keys,
            time_ids=time_ids,
            ids=ids,
            weight=weight,
            is_class_image=is_class_image,
            mask=self.masks.get(indices, keys, loaded, size) if masked else None,
            unet_channels=unet_channels,
        )

    def _encoded(self, pixels: Tensor, condition: Item) -> tuple[Tensor, Item]:
        """Pixels (B, 3, H, W) uint8, and those of their image condition -> what is stored of them, on the CPU."""
        normalized = normalize(pixels)
        latent_params = self.encoder.encode(normalized).cpu()
        if self.visits.condition is None:
            return latent_params, {}
        return latent_params, self.visits.condition.encode(self.encoder, normalized, condition["pixels"])


def as_batch(
    model: DiffusionModel,
    pixels: Tensor,
    prompts: Sequence[str] = (),
    *,
    step: int,
    seed: int = 0,
    masks: Tensor | None = None,
) -> Batch:
    """A Batch from a data loader of your own: encodes what it is given, here and now.

    Args:
        model: its encoder and conditioner are used.
        pixels: (B, 3, H, W) in [-1, 1], as the tutorial's `Normalize([0.5], [0.5])` gives.
        prompts: B captions; none in pixel mode.
        step: of your loop; every draw is a function of seed, step and row, so it must change from call to call.
        masks: for an inpainting model: (B, 1, H, W), above 0 where it is to paint; None: drawn.

    Raises:
        UsageError: the pixels are bytes, or run from 0 to 255.
    """
    if not pixels.is_floating_point() or pixels.abs().max() > 2:
        raise UsageError(
            f"pixels are {str(pixels.dtype).removeprefix('torch.')} from {pixels.min():g} to {pixels.max():g}; "
            "they should be floats in [-1, 1]: pixels / 127.5 - 1"
        )
    ids = tuple(f"step {step} row {row}" for row in range(len(pixels)))
    keys = torch.tensor([seeding.example_key(seed, name, 0) for name in ids])
    height, width = pixels.shape[-2:]
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(ids))
    cond = model.conditioner.kwargs(model.conditioner.encode(prompts), time_ids) if prompts else {}
    latent_params, unet_channels = model.encoder.encode(pixels), None
    if condition := model.image_condition:
        companions = [None] * len(ids) if masks is None else (masks.cpu() > 0).to(torch.uint8) * 255
        shown = [
            condition.pixels(companion, (height, width), key)
            for companion, key in zip(companions, keys.tolist(), strict=True)
        ]
        unet_channels = condition.channels(
            model.encoder, condition.encode(model.encoder, pixels, torch.stack(shown)), keys
        )
    batch = Batch(
        latent_params=latent_params,
        cond=cond,
        keys=keys,
        time_ids=time_ids,
        ids=ids,
        weight=torch.ones(len(ids)),
        unet_channels=unet_channels,
    )
    return batch.to(model.unet.device)


def _stack(tensors: Sequence[Tensor], ids: Sequence[str]) -> Tensor:
    sizes = {tuple(tensor.shape) for tensor in tensors}
    if len(sizes) > 1:
        raise DataError(f"images of one batch differ in size: {', '.join(ids)}; give the dataset a transform")
    return torch.stack(list(tensors))

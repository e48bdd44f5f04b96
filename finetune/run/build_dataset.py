"""The pictures of a run: what `--data` names, or a dataset of the user's own."""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal

from finetune.cache.store import cache_folder
from finetune.config import TrainConfig
from finetune.data.buckets import Buckets
from finetune.data.chunks import Deal, Holding, Volumes, deal_out, together, volumes_for
from finetune.data.concat import Joined, Part, names_of, with_class_pictures
from finetune.data.datasets import (
    holds_rows,
    is_table,
    no_masks,
    open_dataset,
    open_rows,
    picture_folder,
    shards_of,
)
from finetune.data.image_dataset import Pictures
from finetune.data.image_folder import pictures_among
from finetune.data.image_index import PictureMemory
from finetune.data.listing import links_out
from finetune.data.shard_index import index_of
from finetune.data.split import FEWEST, default_fraction, held_out, shown_elsewhere
from finetune.data.transforms import Preprocess
from finetune.data.user_dataset import OwnPictures, Rows
from finetune.errors import DataError, UsageError
from finetune.models.families import bucket_sides
from finetune.models.model_info import Location
from finetune.options import about
from finetune.seeding import fold
from finetune.text import counted, listed

_MASKS: dict[bool | None, Literal["files", "files and alpha", "none"]] = {
    None: "files",
    True: "files and alpha",
    False: "none",
}
"""The masked_loss option -> what masks are."""


def open_pictures(config: TrainConfig, model_info: Location, dataset: Rows | None) -> Volumes:
    """What is to be trained on, at the resolution of the run: of a large folder only the first volume is opened.

    Args:
        config: says where pictures and captions come from, and how they become squares.
        model_info: the model that will learn them.
        dataset: of the user's own, instead of `config.data`; also a `datasets.Dataset`.

    Raises:
        UsageError: the source is not there, or an option says what the dataset has decided already.
        DataError: there is nothing to train on, too much that cannot be, or a latent model would get pictures without
            a caption.
    """
    sources = config.data if dataset is None else (dataset,)
    if not config.follow_links:
        _refuse_links(sources)
    times = config.repeats or (1,) * len(sources)
    if len(times) != len(sources):
        raise UsageError(f"repeats: {counted(len(times), 'number')} for {len(sources)} --data")
    folder = cache_folder(config.cache_dir)
    memory = PictureMemory(folder, strict=config.cache_strict) if folder else None
    deals = _dealt(config, sources, folder, memory)
    opened = _opener(config, model_info, memory)
    volume = partial(_volume, partial(_source, config, model_info, opened, folder), names_of(config.data), deals, times)
    pictures = volume(0)
    if config.class_data:
        pictures = _with_class_pictures(config, pictures, opened)
    if config.validation_data:
        pictures = _with_validation_data(config.validation_data, pictures, opened)
    _refuse_unusable(pictures, config.max_bad_fraction, captioned=model_info.family.latent)
    if not config.validation_data:
        fraction = config.validation_fraction
        fraction = default_fraction(pictures.subjects) if fraction is None else fraction
        pictures.hold_out(held_out(pictures, fraction, config.seed, memory))
    if config.early_stop and not pictures.held_out:
        raise UsageError("early_stop needs pictures that are held out: give --validation_fraction or --validation_data")
    if len(deals[0].parts) == 1:
        return Volumes.whole(pictures)
    whole = together(deals, times)
    counts = [len(pictures.trained), *whole.counts[1:]]
    visits = [pictures.epoch_visits, *whole.visits[1:]]
    later = _later(volume, config, pictures, captioned=model_info.family.latent)
    return Volumes(pictures, counts=counts, visits=visits, found=whole.found, later=later, digest=whole.digest)


def _refuse_links(sources: Sequence[Any]) -> None:
    """Raise DataError for a link that leads out of a folder of pictures."""
    for source in sources:
        if isinstance(source, str) and (folder := Path(source).expanduser()).is_dir() and (links := links_out(folder)):
            raise DataError(
                f"--data {source}: {counted(len(links), 'link')} out of the folder, which --no_follow_links refuses: "
                f"{listed(links)}"
            )


def _volume(
    opened: Callable[[Deal, int], Pictures],
    names: Sequence[str],
    deals: Sequence[Deal],
    times: Sequence[int],
    number: int,
) -> Pictures:
    """One volume of all sources, as one dataset; what is not repeated, and alone, keeps its ids."""
    if tuple(times) == (1,):
        return opened(deals[0], number)
    parts = zip(names or ["data"], deals, times, strict=True)
    return Joined([Part(name, opened(deal, number), n) for name, deal, n in parts if not number or deal.counts[number]])


def _source(
    config: TrainConfig,
    model_info: Location,
    opened: Callable[..., Pictures],
    folder: Path | None,
    deal: Deal,
    number: int,
) -> Pictures:
    """What one volume has of one source."""
    if not isinstance(deal.source, str) and not is_table(deal.source):
        return _own_pictures(config, model_info, deal.source)
    streams = {"stream_rows": config.stream_rows, "kept_in": folder} if isinstance(deal.source, str) else {}
    return opened(deal.source, part=deal.parts[number], **streams)


def _opener(config: TrainConfig, model_info: Location, memory: PictureMemory | None) -> Callable[..., Pictures]:
    """`open_dataset`, as the options say."""
    resolution = config.resolution or model_info.resolution
    return partial(
        open_dataset,
        prompt=config.prompt,
        trigger=config.trigger,
        resolution=resolution,
        resize_mode=config.resize_mode,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        buckets=_buckets(config, model_info, resolution),
        background=config.background,
        caption_lines=config.caption_lines,
        masks=_MASKS[config.masked_loss],
        memory=memory,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )


def _later(
    opened: Callable[[int], Pictures], config: TrainConfig, first: Pictures, *, captioned: bool
) -> Callable[[int], Pictures]:
    """How a volume after the first is opened: without what is held out there.

    Nor does it end a run that has gone on for hours where a few captions are absent: these pictures are left aside.
    """
    held = {first.checked(index).digest for index in first.held_out}

    def later(number: int) -> Pictures:
        volume = opened(number)
        without = [index for index, caption in enumerate(volume.captions) if captioned and not caption]
        many = len(without) > config.max_bad_fraction * len(volume)
        _refuse_unusable(volume, config.max_bad_fraction, captioned=many)
        volume.leave_aside(without, "without a caption")
        copies = [index for index in volume.trained if volume.checked(index).digest in held]
        volume.leave_aside(copies, "copies of pictures that are held out")
        return volume

    return later


def _dealt(
    config: TrainConfig, sources: Sequence[Any], folder: Path | None, memory: PictureMemory | None
) -> list[Deal]:
    """All sources, in volumes where they are large together."""
    holdings = [_holding(source, config, folder, memory) for source in sources]
    known = [holding for holding in holdings if holding is not None]
    divisible = len(known) == len(holdings) and not config.class_data
    if config.volume_size and not divisible:
        raise UsageError(
            "volume_size is for folders of pictures, tables and, with a cache_dir, shards; and not for class_data"
        )
    number = volumes_for(known, config.volume_size) if divisible else 1
    return [
        Deal(source, parts=[None]) if holding is None else deal_out(holding, number, config.caption_column)
        for source, holding in zip(sources, holdings, strict=True)
    ]


def _holding(source: Any, config: TrainConfig, folder: Path | None, memory: PictureMemory | None) -> Holding | None:
    """What a source holds; None: that is not known before it is opened."""
    if not isinstance(source, str) and not is_table(source):
        return None
    if isinstance(source, str) and (files := picture_folder(source)) is not None:
        return Holding(source, len(pictures_among(files)), files)
    if is_table(source) or holds_rows(source):
        if config.masked_loss:
            raise no_masks(source)  # before it is loaded
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        rows = open_rows(source, stream_rows=config.stream_rows, kept_in=folder, **columns)
        return Holding(rows, len(rows))
    if memory and (shards := shards_of(source)):
        return Holding(source, sum(index_of(shard, memory).pictures for shard in shards[0]))
    return None  # shards, which would be read anew each time


def _with_class_pictures(config: TrainConfig, subject: Pictures, opened: Callable[..., Pictures]) -> Pictures:
    kind = opened(config.class_data, prompt=config.class_prompt, trigger=None)
    if empty := kind.captions.count(""):
        pictures = counted(len(kind), "picture")
        raise UsageError(f"class_data: {empty} of {pictures} without a caption; give --class_prompt")
    weight = 1.0 if config.prior_loss_weight is None else config.prior_loss_weight
    return with_class_pictures(names_of(config.data or ("data",))[0], subject, kind, weight)


def _with_validation_data(source: str, pictures: Pictures, opened: Callable[..., Pictures]) -> Pictures:
    """All that is trained on, as it is, and after it the pictures to validate on; not those that are trained on too."""
    joined = Joined([Part("", pictures, 1), Part("--validation_data", opened(source), 0)])
    given = range(len(pictures), len(joined))
    shown = shown_elsewhere(joined, given)
    if (left := len(given) - len(shown)) < FEWEST:
        aside = f", and {len(shown)} that are trained on or near duplicates of such" if shown else ""
        raise UsageError(f"validation_data {source}: {counted(left, 'picture')}{aside}; at least {FEWEST} are needed")
    joined.hold_out(sorted(set(given).difference(shown)))
    joined.leave_aside(shown, "held out, but trained on elsewhere")
    return joined


def _refuse_unusable(pictures: Pictures, most: float, *, captioned: bool) -> None:
    """Raise DataError where more than this share is bad, and UsageError where there are no captions for all."""
    bad, total = pictures.quarantined, len(pictures) + len(pictures.quarantined)
    if len(bad) > most * total:
        raise DataError(
            f"{len(bad)} of {counted(total, 'picture')} cannot be trained on: {listed(list(map(str, bad)), 10)}; "
            f"mend or remove them, or leave them out with --max_bad_fraction {ceil(100 * len(bad) / total) / 100:g}"
        )
    if captioned and (empty := pictures.captions.count("")):
        without = listed([name for name, caption in zip(pictures.ids, pictures.captions, strict=True) if not caption])
        unread = f"; not read: {listed(pictures.passed_over)}" if pictures.passed_over else ""
        raise UsageError(
            f"{empty} of {counted(len(pictures), 'picture')} without a caption ({without}): "
            f"give --prompt, or captions beside them{unread}"
        )


def _buckets(config: TrainConfig, model_info: Location, resolution: int) -> Buckets | None:
    """The sizes that pictures become, as the options say, or as suits the model. None: squares."""
    wanted = config.aspect_ratio_bucketing
    if wanted is None:
        wanted = model_info.family.latent and config.resize_mode == "crop"
    if not wanted:
        return None
    if config.resize_mode == "squash":
        raise UsageError("aspect_ratio_bucketing cannot be used with resize_mode squash")
    sides = bucket_sides(resolution, model_info.multiple)
    sides |= {name: value for name in sides if (value := getattr(config, name)) is not None}
    if (step := sides["bucket_reso_steps"]) % model_info.multiple:
        raise UsageError(
            f"bucket_reso_steps = {step}: {model_info.name} takes multiples of {model_info.multiple} pixels"
        )
    smallest, largest = sides["min_bucket_reso"], sides["max_bucket_reso"]
    return Buckets(resolution, smallest, largest, step, bool(config.bucket_upscale))


def _own_pictures(config: TrainConfig, model_info: Location, dataset: Rows) -> Pictures:
    """A dataset of the user's: with our captions and preprocessing, or as it is where it has a `transform`."""
    resolution = config.resolution or model_info.resolution
    own = getattr(dataset, "transform", None)
    if own is not None and not isinstance(own, Preprocess):
        raise UsageError(
            f"the dataset's transform is a {type(own).__name__}; allowed is a finetune.Preprocess, or none"
        )
    decided = {"dataset", "transform" if own is not None else "dataset"}
    given = [name for name in config.given if getattr(config, name) is not None]
    if useless := [name for name in given if about()[name].decided_by in decided]:
        whose = f"a dataset of your own{' that has a transform' * bool(own)}"
        raise UsageError(f"{min(useless)} cannot be used with {whose}")
    if own is not None and own.resolution != resolution:
        raise UsageError(f"resolution = {resolution}: the dataset's own transform makes {own.resolution}")
    how = own or Preprocess(
        resolution,
        resize_mode=config.resize_mode,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        buckets=_buckets(config, model_info, resolution),
        background=config.background,
    )
    return OwnPictures(dataset, config.prompt, trigger=config.trigger, transform=how)


def identity(volumes: Volumes) -> str:
    """A digest of all that is trained on, as far as it is known before the first step: another one is another run."""
    whole = digest(volumes.first)
    return f"{fold(whole, volumes.digest):016x}" if volumes.digest else whole


def digest(pictures: Pictures) -> str:
    """A digest of the pictures, their names, captions and repeats."""
    captions = [text for index in range(len(pictures)) for text in pictures.texts(index)]
    parts = (*pictures.ids, *captions, *pictures.contents, *pictures.repeats, *pictures.mask_digests)
    if pictures.class_pictures:  # version 0.1.0 visited them in another order
        parts += ("in turn",)
    return f"{fold(*parts):016x}"

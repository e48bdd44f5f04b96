"""Building the dataset of a run: what `--data` names, or a dataset of the user's own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal

from finetune.cache.folder import cache_folder
from finetune.config import TrainConfig
from finetune.config import replace as replace_options
from finetune.data.buckets import Buckets
from finetune.data.chunks import Chunks, SourceChunks, SourceInfo, merge_sources, num_chunks_for, split_into_chunks
from finetune.data.companions import pictures_among
from finetune.data.concat import ConcatDataset, Source, names_of
from finetune.data.datasets import (
    holds_rows,
    is_table,
    no_masks,
    open_dataset,
    open_rows,
    picture_folder,
    shards_of,
)
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_index import ImageIndex
from finetune.data.listing import links_out
from finetune.data.shard_index import index_of
from finetune.data.source_settings import SourceSettings
from finetune.data.split import FEWEST, default_fraction, held_out, shown_elsewhere
from finetune.data.transforms import Preprocess
from finetune.data.user_dataset import MapDataset, UserDataset
from finetune.errors import DataError, UsageError
from finetune.models.families import bucket_sides
from finetune.models.loading import check_resolution
from finetune.models.model_info import ModelInfo
from finetune.options import option_info
from finetune.seeding import fold
from finetune.source_options import CAPTIONING, OWN, parse_settings
from finetune.text import join_limited, pluralize

_OF_ONE = {"repeats": 1, "samples": None, "loss_weight": 1.0, "captioning": {}}
"""Settings that do nothing for a source that is alone."""
_MASKS: dict[bool | None, Literal["files", "files and alpha", "none"]] = {
    None: "files",
    True: "files and alpha",
    False: "none",
}
"""The masked_loss option -> what masks are."""


def open_pictures(config: TrainConfig, model_info: ModelInfo, dataset: MapDataset | None) -> Chunks:
    """What is to be trained on, at the resolution of the run: of a large folder only the first chunk is opened.

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
    folder = cache_folder(config.cache_dir)
    memory = ImageIndex(folder, strict=config.cache_strict) if folder else None
    defaults = default_settings(config, model_info)
    settings = settings_by_source(config, model_info, len(sources))
    chunks_by_source = _assigned(config, sources, folder, memory)
    chunk = partial(_chunk, partial(_open_source, config, memory, folder), settings, chunks_by_source)
    pictures = chunk(0)
    sampled = [each.name for each in settings if each.samples is not None]
    if sampled and len(chunks_by_source[0].parts) > 1:
        raise UsageError(f"source_settings samples ({sampled[0]}) counts all images of a source: give --volume_size 0")
    class_sources = [each.name for each in settings if each.class_images]
    if class_sources and (config.class_data or len(class_sources) == len(settings)):
        other = "class_data" if config.class_data else "no source of the subject"
        raise UsageError(f"source_settings class_images = true ({class_sources[0]}) with {other}: give one of them")
    if config.class_data:
        pictures = _with_class_pictures(config, pictures, defaults, memory)
    if config.validation_data:
        pictures = _with_validation_data(config.validation_data, pictures, defaults, memory)
    _refuse_unusable(pictures, config.max_bad_fraction, captioned=model_info.family.latent)
    if not config.validation_data:
        fraction = config.validation_fraction
        fraction = default_fraction(pictures.num_subject_images) if fraction is None else fraction
        pictures.hold_out(held_out(pictures, fraction, config.seed, memory))
    if config.early_stop and not pictures.held_out:
        raise UsageError("early_stop needs images that are held out: give --validation_fraction or --validation_data")
    if len(chunks_by_source[0].parts) == 1:
        return Chunks.single(pictures)
    totals = merge_sources(chunks_by_source, [each.repeats for each in settings])
    counts = [len(pictures.trained), *totals.counts[1:]]
    visits = [pictures.epoch_visits, *totals.visits[1:]]
    later = _later(chunk, config, pictures, captioned=model_info.family.latent)
    return Chunks(pictures, counts=counts, visits=visits, found=totals.found, later=later, digest=totals.digest)


def _refuse_links(sources: Sequence[Any]) -> None:
    """Raise DataError for a link that leads out of a folder of pictures."""
    for source in sources:
        if isinstance(source, str) and (folder := Path(source).expanduser()).is_dir() and (links := links_out(folder)):
            raise DataError(
                f"--data {source}: {pluralize(len(links), 'link')} out of the folder, which --no_follow_links refuses: "
                f"{join_limited(links)}"
            )


def default_settings(config: TrainConfig, model_info: ModelInfo) -> SourceSettings:
    """Return the settings that the options of a run give to every source. Raises UsageError for what cannot be."""
    resolution = config.resolution or model_info.resolution
    check_resolution(model_info, resolution)
    return SourceSettings(
        prompt=config.prompt,
        trigger=config.trigger,
        caption_source=config.caption_source,
        caption_lines=config.caption_lines,
        image_column=config.image_column,
        caption_column=config.caption_column,
        transform=Preprocess(
            resolution,
            resize_mode=config.resize_mode,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            buckets=_buckets(config, model_info, resolution),
            background=config.background,
        ),
        masks=_MASKS[config.masked_loss],
    )


def settings_by_source(config: TrainConfig, model_info: ModelInfo, count: int) -> list[SourceSettings]:
    """Return the settings of each of the `count` sources that are trained on.

    Raises:
        UsageError: other numbers of repeats or settings than of sources, or settings that cannot be.
    """
    repeats = config.repeats or (1,) * count
    own = config.source_settings or ("",) * count
    for option, given, noun in (("repeats", repeats, "number"), ("source_settings", own, "text")):
        if len(given) != count:
            raise UsageError(f"{option}: {pluralize(len(given), noun)} for {count} --data")
    names = names_of(config.data) or ["data"]
    settings = [
        replace(source_settings(config, model_info, text), name=name, repeats=times)
        for name, times, text in zip(names, repeats, own, strict=True)
    ]
    for each in settings:
        if each.samples is not None and (each.repeats > 1 or each.class_images):
            other = "class_images, which are as many as the subject's" if each.class_images else "repeats"
            raise UsageError(f"source_settings samples = {each.samples} ({each.name}) with {other}: give one of them")
    return settings


def source_settings(config: TrainConfig, model_info: ModelInfo, own: str) -> SourceSettings:
    """Return the settings of a source from the options of the run and those of its own, TOML as in `parse_settings`."""
    given = parse_settings(own)
    own_settings = {name: given.pop(name) for name in OWN if name in given}
    if own_settings.get("class_images"):  # the trigger of the run is the subject's
        given = {"trigger": None, **given}
    settings = default_settings(replace_options(config, **given), model_info)
    captioning = {field: given[option] for option, field in CAPTIONING.items() if option in given}
    return replace(settings, captioning=captioning, **own_settings)


def _chunk(
    open_source: Callable[[SourceSettings, SourceChunks, int], ImageDataset],
    settings: Sequence[SourceSettings],
    chunks_by_source: Sequence[SourceChunks],
    number: int,
) -> ImageDataset:
    """One chunk of all sources, as one dataset; a source that is alone and has no weights keeps its ids."""
    if len(settings) == 1 and settings[0] == replace(settings[0], **_OF_ONE):
        return open_source(settings[0], chunks_by_source[0], number)
    pairs = sorted(zip(settings, chunks_by_source, strict=True), key=lambda pair: pair[0].class_images)
    return ConcatDataset(
        [
            Source(each, open_source(each, source_chunks, number))
            for each, source_chunks in pairs
            if not number or source_chunks.counts[number]
        ]
    )


def _open_source(
    config: TrainConfig,
    memory: ImageIndex | None,
    folder: Path | None,
    settings: SourceSettings,
    source_chunks: SourceChunks,
    number: int,
) -> ImageDataset:
    """What one chunk has of one source."""
    source, part = source_chunks.source, source_chunks.parts[number]
    if isinstance(source, str):
        return _open(source, settings, memory, part=part, stream_rows=config.stream_rows, kept_in=folder)
    return _open(source, settings, memory, part=part) if is_table(source) else _user_dataset(config, settings, source)


def _open(source: Any, settings: SourceSettings, memory: ImageIndex | None, **how: Any) -> ImageDataset:
    """Open what --data names with the settings of the source."""
    return open_dataset(
        source,
        settings.prompt,
        trigger=settings.trigger,
        transform=settings.transform,
        caption_source=settings.caption_source,
        caption_lines=settings.caption_lines,
        masks=settings.masks,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        memory=memory,
        **how,
    )


def _later(
    opened: Callable[[int], ImageDataset], config: TrainConfig, first: ImageDataset, *, captioned: bool
) -> Callable[[int], ImageDataset]:
    """How a chunk after the first is opened: without what is held out there.

    Nor does it end a run that has gone on for hours where a few captions are absent: these pictures are left aside.
    """
    held = {first.image_info(index).digest for index in first.held_out}

    def later(number: int) -> ImageDataset:
        chunk = opened(number)
        without = [index for index, caption in enumerate(chunk.captions) if captioned and not caption]
        many = len(without) > config.max_bad_fraction * len(chunk)
        _refuse_unusable(chunk, config.max_bad_fraction, captioned=many)
        chunk.exclude(without, "without a caption")
        copies = [index for index in chunk.trained if chunk.image_info(index).digest in held]
        chunk.exclude(copies, "copies of images that are held out")
        return chunk

    return later


def _assigned(
    config: TrainConfig, sources: Sequence[Any], folder: Path | None, memory: ImageIndex | None
) -> list[SourceChunks]:
    """All sources, in chunks where they are large together."""
    source_infos = [_source_info(source, config, folder, memory) for source in sources]
    sized = [source_info for source_info in source_infos if source_info is not None]
    class_images = config.class_data or any("class_images" in own for own in config.source_settings)
    divisible = len(sized) == len(source_infos) and not class_images
    if config.volume_size and not divisible:
        raise UsageError(
            "volume_size is for folders of images, tables and, with a cache_dir, shards; and not for class_data"
        )
    number = num_chunks_for(sized, config.volume_size) if divisible else 1
    return [
        SourceChunks(source, parts=[None])
        if source_info is None
        else split_into_chunks(source_info, number, config.caption_column)
        for source, source_info in zip(sources, source_infos, strict=True)
    ]


def _source_info(source: Any, config: TrainConfig, folder: Path | None, memory: ImageIndex | None) -> SourceInfo | None:
    """What a source holds; None: that is not known before it is opened."""
    if not isinstance(source, str) and not is_table(source):
        return None
    if isinstance(source, str) and (files := picture_folder(source)) is not None:
        return SourceInfo(source, len(pictures_among(files)), files)
    if is_table(source) or holds_rows(source):
        if config.masked_loss:
            raise no_masks(source)  # before it is loaded
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        rows = open_rows(source, stream_rows=config.stream_rows, kept_in=folder, **columns)
        return SourceInfo(rows, len(rows))
    if memory and (shards := shards_of(source)):
        return SourceInfo(source, sum(index_of(shard, memory).pictures for shard in shards[0]))
    return None  # shards, which would be read again each time


def _with_class_pictures(
    config: TrainConfig, subject: ImageDataset, defaults: SourceSettings, memory: ImageIndex | None
) -> ImageDataset:
    """The pictures of a subject, and after them those of its class, so that the class is not forgotten.

    In an epoch the class is seen as often as the subject, its pictures in turn, and counts `prior_loss_weight` times as
    much. The loss of a step is in expectation (subject + weight class) / (1 + weight), where diffusers' script adds
    without dividing (Ruiz et al. 2022, "DreamBooth", eq. 2).
    """
    weight = 1.0 if config.prior_loss_weight is None else config.prior_loss_weight
    settings = replace(
        defaults, name="class", prompt=config.class_prompt, trigger=None, loss_weight=weight, class_images=True
    )
    pictures = _open(config.class_data, settings, memory)
    if empty := pictures.captions.count(""):
        count = pluralize(len(pictures), "image")
        raise UsageError(f"class_data: {empty} of {count} without a caption; give --class_prompt")
    subject_name = names_of(config.data or ("data",))[0]
    return ConcatDataset([Source(replace(defaults, name=subject_name), subject), Source(settings, pictures)])


def _with_validation_data(
    source: str, pictures: ImageDataset, defaults: SourceSettings, memory: ImageIndex | None
) -> ImageDataset:
    """All that is trained on, as it is, and after it the pictures to validate on; not those that are trained on too."""
    settings = replace(defaults, name="--validation_data", repeats=0)
    dataset = ConcatDataset([Source(defaults, pictures), Source(settings, _open(source, settings, memory))])
    given = range(len(pictures), len(dataset))
    trained_too = shown_elsewhere(dataset, given)
    if (left := len(given) - len(trained_too)) < FEWEST:
        excluded = f", and {len(trained_too)} that are trained on or near duplicates of such" if trained_too else ""
        raise UsageError(
            f"validation_data {source}: {pluralize(left, 'image')}{excluded}; at least {FEWEST} are needed"
        )
    dataset.hold_out(sorted(set(given).difference(trained_too)))
    dataset.exclude(trained_too, "held out, but trained on elsewhere")
    return dataset


def _refuse_unusable(pictures: ImageDataset, most: float, *, captioned: bool) -> None:
    """Raise DataError where more than this share is bad, and UsageError where there are no captions for all."""
    bad, total = pictures.quarantined, len(pictures) + len(pictures.quarantined)
    if len(bad) > most * total:
        raise DataError(
            f"{len(bad)} of {pluralize(total, 'image')} cannot be trained on: "
            f"{join_limited(list(map(str, bad)), 10)}; "
            f"repair or remove them, or skip them with --max_bad_fraction {ceil(100 * len(bad) / total) / 100:g}"
        )
    if captioned and (empty := pictures.captions.count("")):
        without = join_limited(
            [name for name, caption in zip(pictures.ids, pictures.captions, strict=True) if not caption]
        )
        unread = f"; not read: {join_limited(pictures.passed_over)}" if pictures.passed_over else ""
        raise UsageError(
            f"{empty} of {pluralize(len(pictures), 'image')} without a caption ({without}): "
            f"give --prompt, or caption files next to the images{unread}"
        )


def _buckets(config: TrainConfig, model_info: ModelInfo, resolution: int) -> Buckets | None:
    """The sizes that pictures become, as the options say, or as suits the model. None: squares."""
    bucketing = config.aspect_ratio_bucketing
    if bucketing is None:
        bucketing = model_info.family.latent and config.resize_mode == "crop"
    if not bucketing:
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


def _user_dataset(config: TrainConfig, settings: SourceSettings, dataset: MapDataset) -> ImageDataset:
    """A dataset of the user's: with our captions and preprocessing, or as it is where it has a `transform`."""
    transform = getattr(dataset, "transform", None)
    if transform is not None and not isinstance(transform, Preprocess):
        raise UsageError(
            f"the dataset's transform is a {type(transform).__name__}; expected a finetune.Preprocess, or none"
        )
    decided = {"dataset", "transform" if transform is not None else "dataset"}
    given = [name for name in config.given if getattr(config, name) is not None]
    if useless := [name for name in given if option_info()[name].decided_by in decided]:
        whose = f"a dataset of your own{' that has a transform' * bool(transform)}"
        raise UsageError(f"{min(useless)} cannot be used with {whose}")
    assert settings.transform is not None
    if transform is not None and transform.resolution != settings.transform.resolution:
        raise UsageError(
            f"resolution = {settings.transform.resolution}: the dataset's own transform makes {transform.resolution}"
        )
    return UserDataset(dataset, settings.prompt, trigger=settings.trigger, transform=transform or settings.transform)


def identity(chunks: Chunks) -> str:
    """A digest of all that is trained on, as far as it is known before the first step: another one is another run."""
    dataset_digest = digest(chunks.first)
    return f"{fold(dataset_digest, chunks.digest):016x}" if chunks.digest else dataset_digest


def digest(pictures: ImageDataset) -> str:
    """A digest of the pictures, their names, captions and repeats."""
    captions = [text for index in range(len(pictures)) for text in pictures.texts(index)]
    fields = (*pictures.ids, *captions, *pictures.contents, *pictures.repeats, *pictures.companion_digests())
    if pictures.class_pictures:  # version 0.1.0 visited them in another order
        fields += ("in turn",)
    fields += tuple(f"{len(some)} in turn, {visits}" for some, visits in pictures.sampled)
    return f"{fold(*fields):016x}"

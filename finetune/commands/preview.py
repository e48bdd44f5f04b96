"""finetune-unet preview: a contact sheet of what the model will see."""

from dataclasses import dataclass
from pathlib import Path

from finetune.atomic_io import is_inside
from finetune.config import TrainConfig
from finetune.data.data_source import check_sources
from finetune.errors import UsageError

WITH_TRAINING_OPTIONS = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show images as training with the same options will see them: sizes, crops, captions and token counts."""

    max_pictures: int = 60
    """Number of images on the sheet; captions are counted for all."""
    output: str = "preview.png"
    """Image file to write."""


def run(options: Options, config: TrainConfig) -> None:
    """Write the contact sheet, print its path and what is to be noticed, and name captions that will be cut.

    Raises:
        UsageError: `max_pictures` below 1, or the sheet cannot be written.
        DataError: as for training.
    """
    from finetune.cache.image_source import LiveImages
    from finetune.models.conditioners import chunks_of, count_tokens
    from finetune.models.image_condition import image_condition_of
    from finetune.models.loading import check_resolution
    from finetune.models.model_info import locate
    from finetune.models.source import open_source
    from finetune.results.contact_sheet import contact_sheet
    from finetune.run.build_dataset import open_pictures
    from finetune.run.summary import sizes
    from finetune.seeding import example_key
    from finetune.text import pluralize

    if options.max_pictures < 1:
        raise UsageError(f"--max_pictures {options.max_pictures}: expected 1 or more")
    check_sources(config.data)
    path = Path(options.output).expanduser()
    for source in config.data:
        if is_inside(path, Path(source).expanduser()):
            where = f"--output {path} lies inside --data {source}"
            raise UsageError(f"{where}, which would be trained on; give one elsewhere")
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    chunks = open_pictures(config, model_info, None)
    pictures = chunks.first
    counts, limit = [0] * len(pictures), 0
    if model_info.family.latent:
        tokenizer = open_source(model_info, config.tokenizer).tokenizer("tokenizer")
        counts = count_tokens(tokenizer, pictures.captions)
        limit = chunks_of(config.max_token_length) * (tokenizer.model_max_length - 2)
    visits, cells, names = LiveImages(pictures, image_condition_of(model_info.family.image_condition)), [], []
    for index in range(min(len(pictures), options.max_pictures)):
        preview = visits.masked_preview(index, example_key(config.seed, pictures.ids[index], 0))
        (height, width), (target_height, target_width) = preview.crop.original, preview.crop.size
        cells.append(preview.latent_params)
        names.append(f"{target_width}x{target_height} of {width}x{height}: {pictures.ids[index]}")
    sheet = contact_sheet(cells, names, pictures.captions, counts, limit)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path} cannot be written: {error}") from error
    print(f"{path}: {len(cells)} of {pluralize(len(pictures), 'image')}, {sizes(pictures)}")
    if len(chunks) > 1:
        print(f"note: these are the first of {len(chunks)} volumes; the others are read when a run reaches them")
    for line in pictures.notes():
        print(f"note: {line}")
    for name, count in zip(pictures.ids, counts, strict=True):
        if limit and count > limit:
            print(f"{name}: {count} tokens, of which the model reads {limit}")

"""finetune-unet preview: a contact sheet of what the model will see."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import UsageError
from finetune.files import is_inside


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show the pictures as training will see them: after resize and crop, with captions and token counts."""

    data: str
    """A folder of pictures, a folder of parquet/arrow files, or a Hugging Face dataset id."""
    model: str = "tiny"
    """Model to be trained; its tokenizer counts, and its resolution is the default."""
    tokenizer: str | None = None
    """For a checkpoint in one file: as in training."""
    prompt: str | None = None
    """Caption for every picture that has none of its own."""
    trigger: str | None = None
    """A word placed before every caption, or where the caption says [trigger]."""
    resolution: int | None = None
    """Pixels per side. Default: the model's own."""
    resize_mode: Literal["crop", "squash"] = "crop"
    """crop: shorter side to the resolution, then a square crop. squash: both sides at once."""
    center_crop: bool = True
    """Crop the centre; with --no-center_crop the random place that training with this seed will take."""
    max_token_length: Literal[77, 150, 225] = 77
    """Longest caption in tokens."""
    image_column: str = "image"
    """Picture column of a Hugging Face dataset."""
    caption_column: str = "text"
    """Caption column of a Hugging Face dataset."""
    seed: int = 0
    """Seed of the run whose random crops are shown."""
    max_pictures: int = 60
    """How many pictures the sheet shows; all captions are counted."""
    output: str = "preview.png"
    """The picture to write."""


def run(options: Options) -> None:
    """Write the contact sheet, print its path, and name captions that will be cut.

    Raises:
        UsageError: `max_pictures` below 1, or the sheet cannot be written.
        DataError: as for training.
    """
    from finetune.cache.visits import Live
    from finetune.data.datasets import open_dataset
    from finetune.models.conditioners import chunks_of, count_tokens
    from finetune.models.loading import check_resolution
    from finetune.models.locate import locate
    from finetune.models.source import open_source
    from finetune.results.contact_sheet import contact_sheet
    from finetune.seeding import example_key
    from finetune.wording import counted

    if options.max_pictures < 1:
        raise UsageError(f"--max_pictures {options.max_pictures}: allowed is 1 or more")
    path, data = Path(options.output).expanduser(), Path(options.data).expanduser()
    if is_inside(path, data):
        raise UsageError(f"--output {path} lies inside --data {data}, which would be trained on; give one elsewhere")
    found = locate(options.model)
    resolution = options.resolution or found.resolution
    check_resolution(found, resolution)
    pictures = open_dataset(
        options.data,
        prompt=options.prompt,
        trigger=options.trigger,
        resolution=resolution,
        resize_mode=options.resize_mode,
        center_crop=options.center_crop,
        image_column=options.image_column,
        caption_column=options.caption_column,
    )
    counts, limit = [0] * len(pictures), 0
    if found.family.latent:
        tokenizer = open_source(found, options.tokenizer).tokenizer("tokenizer")
        counts = count_tokens(tokenizer, pictures.captions)
        limit = chunks_of(options.max_token_length) * (tokenizer.model_max_length - 2)
    shown = range(min(len(pictures), options.max_pictures))
    keys = [example_key(options.seed, pictures.ids[index], 0) for index in shown]
    visits = Live(pictures)
    cells = [visits.load(index, key)[0] for index, key in zip(shown, keys, strict=True)]
    sheet = contact_sheet(cells, pictures.ids, pictures.captions, counts, limit)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output {path} cannot be written: {error}") from error
    print(f"{path}: {len(cells)} of {counted(len(pictures), 'picture')} at {resolution} px")
    for line in pictures.notes():
        print(f"note: {line}")
    for name, count in zip(pictures.ids, counts, strict=True):
        if limit and count > limit:
            print(f"{name}: {count} tokens, of which the model reads {limit}")

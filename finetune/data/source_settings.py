"""SourceSettings: what a run does with the images of one source. The run's options are the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.data.captions import COLUMN, CaptionSource, Lines
from finetune.data.hub_dataset import IMAGE_COLUMN
from finetune.data.transforms import Preprocess


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How the pictures of a source are captioned, cropped, masked, repeated and weighted."""

    name: str = ""
    """What the ids of its pictures begin with, in a run of several sources; "": they stay as they are."""
    prompt: str | None = None
    """Caption of the pictures that have none of their own."""
    trigger: str | None = None
    """Word that takes the place of every [trigger], or is put in front of each caption."""
    caption_source: CaptionSource = "files"
    """Where the captions come from: files or columns, the names of the pictures, or the prompt for all of them."""
    caption_lines: Lines = "joined"
    """What the lines of a caption file are: one caption, captions that visits take turns with, or a caption and what
    is left out."""
    image_column: str = IMAGE_COLUMN
    """Column of pictures, where the source has rows."""
    caption_column: str = COLUMN
    """Column of captions, where the source has rows or metadata files."""
    captioning: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the run's `CaptionAugmentation` that are otherwise here."""
    transform: Preprocess | None = None
    """Resolution, crop, flips, buckets and background; None: the pictures are of one size that the model can take."""
    masks: Literal["files", "files and alpha", "none"] = "files"
    """Which masks say where an error counts."""
    repeats: int = 1
    """How many times each of the source's own repeats comes in an epoch; 0: the pictures are held out."""
    samples: int | None = None
    """How many of the pictures an epoch visits, in turns; None: all, as often as they are repeated."""
    loss_weight: float = 1.0
    """How much each picture counts in the loss of a step, relative to the others."""
    class_images: bool = False
    """Whether its pictures show the class of the subject, so that it is not forgotten (Ruiz et al. 2022)."""

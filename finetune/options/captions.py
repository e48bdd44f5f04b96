"""The captions of a run."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, STEPS_OR_SHARE, option


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Captions."""

    prompt: str | None = option(
        None, requires="text", aliases=("instance_prompt",), suggest_for=("caption",), decided_by="transform"
    )
    """Caption of every image that has none."""
    trigger: str | None = option(None, requires="text", decided_by="transform")
    """Word put in front of every caption that does not have it, or in place of [trigger] in the caption."""
    caption_dropout: float | None = option(None, BELOW_ONE, requires="text", suggest_for=("caption_dropout_rate",))
    """Share of visits with an empty caption. Default: 0.05 if captions vary, else 0."""
    caption_dropout_every_n_epochs: int | None = option(None, AT_LEAST_ONE, requires="text")
    """Every n-th epoch is without captions."""
    caption_source: Literal["files", "filename", "prompt"] = option(
        "files", requires="text", suggest_for=("caption_strategy", "prompt_source"), decided_by="dataset"
    )
    """files: captions are in .txt files, metadata files or a column. filename: the name of the image is its caption,
    without a number at its end and with spaces for underscores. prompt: --prompt is the caption of every image."""
    caption_lines: Literal["joined", "chosen", "first"] = option("joined", requires="text")
    """joined: the lines of a file are one caption. chosen: each line is a caption, and each visit uses one of them.
    first: the other lines are left out."""
    caption_prefix: str | None = option(None, requires="text")
    """Text in front of each caption."""
    caption_suffix: str | None = option(None, requires="text")
    """Text behind each caption."""
    shuffle_caption: bool = option(False, requires="text")
    """Shuffle the tags of a caption, its comma-separated parts, at each visit. Captions are then encoded at each
    visit."""
    caption_tag_dropout: float = option(0.0, BELOW_ONE, requires="text", aliases=("caption_tag_dropout_rate",))
    """Share of the tags that each visit leaves out."""
    caption_tag_dropout_mode: Literal["each", "rising", "all"] = option(
        "each", requires="caption_tag_dropout", suggest_for=("tag_dropout_mode",)
    )
    """each: tags are left out one by one. rising: the later a tag, the more often, up to that share for the last. all:
    that share of visits has none of them (OneTrainer)."""
    token_warmup_step: int | float | None = option(None, STEPS_OR_SHARE, requires="text")
    """Steps in which the number of tags rises to all of them; below 1: a share of the run."""
    token_warmup_min: int = option(1, NOT_NEGATIVE, requires="token_warmup_step")
    """Number of tags at the first step, in addition to those that keep_tokens keeps."""
    keep_tokens: int | None = option(
        None, NOT_NEGATIVE, requires="shuffle_caption, caption_tag_dropout or token_warmup_step"
    )
    """Number of tags at the start that stay in place and are never left out. Default: 0."""
    caption_separator: str = option(",", requires="shuffle_caption, caption_tag_dropout or token_warmup_step")
    """What separates tags."""
    keep_tokens_separator: str | None = option(
        None, requires="shuffle_caption, caption_tag_dropout or token_warmup_step"
    )
    """Mark in a caption before which tags stay in place, instead of keep_tokens, and behind a second one too: |||."""
    secondary_separator: str | None = option(None, requires="text")
    """Separates tags that stay together; becomes caption_separator in the end: ;;;."""
    weighted_captions: bool = option(False, requires="text")
    """Give words in captions and prompts weights: (word:1.2), (word) for 1.1, [word] for less; brackets nest."""
    enable_wildcard: bool = option(False, requires="text", suggest_for=("wildcards",))
    """Take one part of {a|b|c} in a caption at each visit."""
    max_token_length: Literal[77, 150, 225] = option(77, requires="text")
    """Maximum caption length in tokens. 150 and 225 are encoded in chunks of 75."""
    clip_skip: int | None = option(None, AT_LEAST_ONE, requires="text")
    """Use the text encoder's hidden state this many layers from the end (1: the last layer, as in sd-scripts and
    A1111)."""
    caption_column: str = option("text", decided_by="dataset")
    """Caption column of a Hugging Face dataset, or of metadata.jsonl, .csv or .parquet next to images."""

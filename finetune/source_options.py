"""The settings of single sources of images, as options of the run that are otherwise for them."""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from finetune.config import checked, fitted, suggest
from finetune.errors import UsageError

CAPTIONING: Mapping[str, str] = {
    "trigger": "trigger",
    "caption_dropout": "dropout",
    "caption_dropout_every_n_epochs": "dropout_every_n_epochs",
    "shuffle_caption": "shuffle",
    "keep_tokens": "keep_tokens",
    "caption_tag_dropout": "tag_dropout",
    "caption_tag_dropout_mode": "tag_dropout_mode",
    "enable_wildcard": "wildcards",
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
    "caption_separator": "separator",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
}
"""Option -> the field of `CaptionAugmentation` that it sets."""
OF_A_SOURCE = (
    *CAPTIONING,
    "prompt",
    "caption_source",
    "caption_lines",
    "caption_column",
    "image_column",
    "masked_loss",
    "resolution",
    "resize_mode",
    "center_crop",
    "random_flip",
    "background",
)
"""Options of a run that a source may have otherwise."""
OWN = {"loss_weight": float, "samples": int, "class_images": bool}
"""What else a source may have: how much its images count in the loss, how many of them an epoch visits, in turns, and
whether they show the subject's class."""


def parse_settings(text: str) -> dict[str, Any]:
    """Options of a source from the entries of an inline table of TOML: 'prompt = "a dog", random_flip = true'.

    Raises:
        UsageError: it is none, or names an option that a source cannot have, or a wrong value.
    """
    try:
        tables = tomllib.loads(f"settings = {{{text}}}")
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"source_settings {text}: expected NAME = VALUE, ... as in TOML ({error})") from error
    if len(tables) > 1:
        raise UsageError(f"source_settings {text}: expected NAME = VALUE, ... as in TOML")
    return {name: _checked(name, value) for name, value in tables["settings"].items()}


def _checked(name: str, value: Any) -> Any:
    if name in OWN:
        try:
            value = fitted(OWN[name], value)
        except ValueError as error:
            raise UsageError(f"source_settings {name} = {value!r}: {error}") from error
        if name != "class_images" and not value > 0:
            raise UsageError(f"source_settings {name} = {value}: expected above 0")
        return value
    if name not in OF_A_SOURCE:
        raise UsageError(f"source_settings {name}: not an option of a source{suggest(name, (*OF_A_SOURCE, *OWN))}")
    return checked(name, value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """The text that `parse_settings` reads as these settings."""
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())

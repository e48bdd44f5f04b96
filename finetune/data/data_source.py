"""Validation of `--data`. Free of torch, so that a misspelt folder is reported at once."""

import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from finetune.errors import UsageError

_MAGIC = "*?["


def check_sources(sources: Sequence[str]) -> None:
    """Raise UsageError where there is none, or for the first that could not be opened."""
    if not sources:
        raise UsageError("--data is missing; give a folder of images or a dataset id")
    for source in sources:
        check_source(source)


def check_source(source: str) -> None:
    """Raise UsageError for what `open_dataset` could not find; opens nothing and asks nobody."""
    if not source:
        raise UsageError("--data is empty; give a folder of images or a dataset id")
    if os.path.exists(os.path.expanduser(source)) or is_pattern(source):
        return
    if source.lower().endswith(".tar"):
        raise UsageError(f"--data {source}: no such file")
    if "/" not in source:
        # A plain word is a misspelt folder sooner than one of the hub's few datasets without an owner.
        raise UsageError(f"--data {source}: no such folder, and not a Hugging Face dataset id (owner/name)")


def is_pattern(source: str) -> bool:
    """Whether it stands for several tar files: shards/*.tar."""
    return source.lower().endswith(".tar") and any(sign in source for sign in _MAGIC)


def folder_of(pattern: str) -> Path:
    """The folder below which a pattern looks: shards of shards/*.tar."""
    return Path(*takewhile(lambda part: not any(sign in part for sign in _MAGIC), Path(pattern).parts))


def called(source: str) -> str:
    """What a source is called: the last part of its path; of a pattern that of its folder."""
    return folder_of(source).name if is_pattern(source) else Path(source).name

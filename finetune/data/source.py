"""What `--data` may name. Free of torch, so that a misspelt folder is told at once."""

import os
from collections.abc import Sequence

from finetune.errors import UsageError


def check_sources(sources: Sequence[str]) -> None:
    """Raise UsageError where there is none, or for the first that could not be opened."""
    if not sources:
        raise UsageError("--data is missing; give a folder of pictures or a dataset id")
    for source in sources:
        check_source(source)


def check_source(source: str) -> None:
    """Raise UsageError for what `open_dataset` could not find; opens nothing and asks nobody."""
    if not source:
        raise UsageError("--data is empty; give a folder of pictures or a dataset id")
    if not os.path.exists(os.path.expanduser(source)) and "/" not in source:
        # A plain word is a misspelt folder sooner than one of the hub's few datasets without an owner.
        raise UsageError(f"--data {source}: no such folder, nor an id as on the Hugging Face hub (owner/name)")

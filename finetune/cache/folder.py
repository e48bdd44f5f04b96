"""The user's cache folder."""

import os
from pathlib import Path


def default_folder() -> Path:
    """Where items are kept unless somebody says otherwise: `finetune-unet` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "finetune-unet"


def cache_folder(cache_dir: str | Path | None) -> Path | None:
    """The folder that `--cache_dir` means: None is the default one, "none" (answered with None) is no folder at all."""
    if cache_dir == "none":
        return None
    return default_folder() if cache_dir is None else Path(cache_dir).expanduser().absolute()

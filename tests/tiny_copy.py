"""A model folder to break or change: the embedded model's files, copied."""

import json
import shutil
from pathlib import Path

from finetune.models.tiny import DIGESTS, tiny_folder


def copy_tiny(folder: Path, *, prediction_type: str | None = None) -> None:
    """Copy `tiny` into a folder; its scheduler may say another `prediction_type` than its weights have."""
    shutil.copytree(tiny_folder(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(DIGESTS))
    if prediction_type is None:
        return
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction_type}))

"""Export: what a run gives away, as safetensors that diffusers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict
from safetensors.torch import save

from finetune.errors import UsageError
from finetune.files import flush_to_disk, flush_tree, remove
from finetune.models.loading import DiffusionModel
from finetune.models.locate import LORA_FILE
from finetune.results.verify import verify_export

ADAPTER = "default"
"""Name that diffusers gives an adapter added without one."""


def has_adapter(unet: Any) -> bool:
    """True where `add_lora` was called on the UNet."""
    return bool(getattr(unet, "peft_config", None))


def export(model: DiffusionModel, folder: str | Path) -> float:
    """Write the trained model to `folder`, load it back through diffusers and compare.

    With an adapter: `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights(folder)`. Otherwise a whole
    pipeline folder, for `DiffusionPipeline.from_pretrained(folder)`. Files appear whole or not at all.

    Returns:
        The largest difference between the trained and the reloaded UNet's outputs, relative to the largest output.

    Raises:
        RunError: what was written does not load back to the same model; it is left in `.export.part`.
        UsageError: folders named like a pipeline's parts are in the way.
    """
    folder = Path(folder)
    _refuse_foreign_parts(model, folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".export.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    if has_adapter(model.unet):
        _write_lora(model.unet, scratch / LORA_FILE)
    else:
        model.pipeline().save_pretrained(scratch)
    difference = verify_export(model, scratch)
    flush_tree(scratch)
    index = folder / "model_index.json"
    index.unlink(missing_ok=True)  # while parts are exchanged the folder is no pipeline; the index comes back last
    for entry in sorted(scratch.iterdir(), key=lambda path: path.name == index.name):
        if (folder / entry.name).is_dir():
            remove(folder / entry.name)
        entry.rename(folder / entry.name)
    scratch.rmdir()
    flush_to_disk(folder)
    return difference


def _refuse_foreign_parts(model: DiffusionModel, folder: Path) -> None:
    """A pipeline is replaced by a pipeline, but folders that only happen to be named like its parts are not."""
    parts = () if has_adapter(model.unet) else ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    found = [name for name in parts if (folder / name).exists()]
    if found and not (folder / "model_index.json").exists():
        raise UsageError(f"{folder / found[0]} is in the way of the export, and {folder} is no diffusers pipeline")


def _write_lora(unet: Any, path: Path) -> None:
    """Raw peft keys under `unet.`, and the adapter's config beside them, so that alpha and rank survive exactly.

    Its dropout is left out: a pipeline that loads the file would apply it while drawing (diffusers adds the adapter
    in train mode).

    One metadata entry only: safetensors writes several in random order, and files could not be compared.
    """
    weights = {
        f"unet.{name}": t.contiguous() for name, t in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()
    }
    config = {f"unet.{n}": v for n, v in (unet.peft_config[ADAPTER].to_dict() | {"lora_dropout": 0.0}).items()}
    text = json.dumps(config, sort_keys=True, default=sorted)  # sets become sorted lists
    path.write_bytes(save(weights, {LORA_ADAPTER_METADATA_KEY: text}))  # `save_file` would make it private to the user

"""export: the result of a run as safetensors that diffusers loads."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.atomic_io import flush_to_disk, flush_tree, move_over, write_whole
from finetune.errors import RunError, UsageError
from finetune.models.families import FAMILIES
from finetune.models.loading import DiffusionModel
from finetune.models.lora import LORA_FILE, Adapter
from finetune.models.pipeline_folder import write_pipeline
from finetune.results.verify import differing_from_kohya, verify_export, verify_kohya

EXPORTS = "exports"
"""The folder, in that of a run, for the forms that the run was asked for beside its own."""
INDEX = "model_index.json"
"""What makes a folder a diffusers pipeline."""
MOVING = ".export.moving"
"""A file that is there while an export is moved in."""


@dataclass(frozen=True)
class Exported:
    """What an export has left in a folder."""

    files: tuple[Path, ...]
    load: str
    """Python, a statement a line, with the folder's name to be filled in."""
    adapter: bool
    """A LoRA, to be put on its base model; False: a pipeline."""
    takes_text: bool


def names_of_exports() -> tuple[str, ...]:
    """What an export, or a part of one, is called in its folder."""
    return (LORA_FILE, INDEX, *dict.fromkeys(part for family in FAMILIES.values() for part in family.components))


def kohya_file(folder: Path, step: int | None = None) -> Path:
    """The LoRA in kohya's layout, named after the folder; that of a checkpoint with its step."""
    name = folder.resolve().name
    return folder / (f"{name}.safetensors" if step is None else f"{name}-{step:06d}.safetensors")


def kohya_files(folder: Path) -> list[tuple[int | None, Path]]:
    """(step, file) of every LoRA in kohya's layout in a folder; the step of the final one is None."""
    name = re.escape(folder.resolve().name)
    matches = [(path, re.fullmatch(rf"{name}(?:-(\d{{6,}}))?\.safetensors", path.name)) for path in folder.glob("*")]
    return [(int(match[1]) if match[1] else None, path) for path, match in sorted(matches) if match]


def exported(folder: Path) -> Exported | None:
    """The export in a folder, None where there is none."""
    if Adapter.exists_in(folder):
        viewers = kohya_file(folder)
        files = (folder / LORA_FILE, *([viewers] if viewers.is_file() else []))
        return Exported(files, Adapter.how_to_load(folder), adapter=True, takes_text=True)
    index = folder / INDEX
    if not index.is_file():
        return None
    components = [name for name in json.loads(index.read_text(encoding="utf-8")) if name[0] != "_"]
    inside = sorted(path for part in components for path in (folder / part).rglob("*") if path.is_file())
    files = [path for path in inside if not path.name.startswith(".")]
    load = 'DiffusionPipeline.from_pretrained("{}")'
    return Exported((index, *files), load, adapter=False, takes_text="text_encoder" in components)


def export(model: DiffusionModel, folder: str | Path, metadata: Mapping[str, str] | None = None) -> float:
    """Write the trained model to `folder`, load it back through diffusers and compare.

    With an adapter: `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights(folder)`, and the same in
    kohya's layout as `<name of the folder>.safetensors`, for ComfyUI, A1111 and Forge. Otherwise a whole pipeline
    folder, for `DiffusionPipeline.from_pretrained(folder)`. Files appear whole or not at all.

    Args:
        model: with an adapter, or with trained weights.
        folder: made if it is not there.
        metadata: metadata of the kohya file, beside what the adapter itself knows.

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
    if adapter := Adapter.attached_to(model.unet):
        adapter.save(scratch, model.scheduler_changes)
        viewers = scratch / kohya_file(folder).name
        adapter.save_kohya(viewers, metadata or {})
        difference = max(verify_export(model, scratch), verify_kohya(model, viewers))
    else:
        write_pipeline(model, scratch)
        difference = verify_export(model, scratch)
    flush_tree(scratch)
    _move_in(scratch, folder)
    return difference


def _move_in(scratch: Path, folder: Path) -> None:
    """Move an export's files and folders from `scratch` to `folder`, over those of an earlier export.

    While they are exchanged the folder is no pipeline: the index goes first and comes back last. A marker says for this
    time that what is named like a pipeline's part is an export's, so that one that was cut off can be replaced.
    """
    write_whole(folder / MOVING, "An export is being moved in.\n")
    (folder / INDEX).unlink(missing_ok=True)
    for entry in sorted(scratch.iterdir(), key=lambda path: path.name == INDEX):
        move_over(entry, folder / entry.name)
    flush_to_disk(folder)
    (folder / MOVING).unlink()
    scratch.rmdir()


def has_own_parts(folder: Path) -> bool:
    """Whether the folders here that are named like a pipeline's parts belong to an export, whole or cut off."""
    return (folder / INDEX).exists() or (folder / MOVING).exists()


def step_export(model: DiffusionModel, folder: Path, step: int, metadata: Mapping[str, str]) -> Callable[[], None]:
    """What writes the adapter as it is now in kohya's layout, for a look at it in a viewer; no adapter: nothing.

    Called, at any later time and in any thread, it raises RunError where the file does not hold these very tensors.
    """
    adapter = Adapter.attached_to(model.unet)
    state = {name: tensor.to("cpu", copy=True) for name, tensor in adapter.kohya_state().items()} if adapter else {}

    def write() -> None:
        if adapter is None:
            return
        path = kohya_file(folder, step)
        adapter.save_kohya(path, metadata, state)
        if differing := differing_from_kohya(adapter, path, state):
            raise RunError(f"{path} does not hold what was learned: {differing[0]} differs")

    return write


def discard_steps_after(folder: Path, step: int) -> None:
    """Delete the files of steps above `step`: a run that resumes from there will not come to the same ones."""
    for later, path in kohya_files(folder):
        if later is not None and later > step:
            path.unlink()


def _refuse_foreign_parts(model: DiffusionModel, folder: Path) -> None:
    """A pipeline is replaced by a pipeline, but folders that only happen to be named like its parts are not."""
    components = () if Adapter.attached_to(model.unet) else model.family.components
    foreign = [name for name in components if (folder / name).exists()]
    if foreign and not has_own_parts(folder):
        raise UsageError(f"{folder / foreign[0]} is in the way of the export, and {folder} is not a diffusers pipeline")

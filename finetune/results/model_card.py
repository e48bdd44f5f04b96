"""Model cards: README.md of a repository on the Hugging Face hub."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData

from finetune.data.captions import with_trigger
from finetune.errors import RunError
from finetune.models.families import FAMILIES
from finetune.options import option_info
from finetune.results.export import Exported, exported

TAG = "finetune-unet"
"""Tag of repositories that were pushed from here."""
_UNCONDITIONAL = "unconditional-image-generation"
_GRID = re.compile(r"step-(\d+)\.png")


def export_of(folder: Path) -> Exported:
    """Return the files of a run folder's export. Raises RunError where nothing was exported."""
    files = exported(folder)
    if files is None:
        raise RunError(f"{folder}: there is no export to push")
    return files


def grids_of(folder: Path) -> list[Path]:
    """The sample grids, oldest first."""
    grids = [(int(match[1]), path) for path in folder.glob("samples/*") if (match := _GRID.fullmatch(path.name))]
    return [path for _, path in sorted(grids)]


def model_card(
    folder: Path,
    repository: str,
    settings: Mapping[str, Any],
    *,
    image_inputs: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """README.md for an exported run: what it is, its last sample grid, how to load it, its settings.

    Free text, such as a caption, stands only in code blocks, as a Python or TOML string on one line: there it cannot
    become Markdown, HTML or front matter.

    Args:
        folder: a run folder with an export.
        repository: the hub id under which it will be found.
        settings: option -> value; those that say nothing about the result are left out, local paths are shortened
            to their last part.
        image_inputs: argument of the pipeline -> name of an image file, of a model that is shown images.

    Raises:
        RunError: nothing was exported to the folder.
    """
    files = export_of(folder)
    options = option_info()
    facts = {
        name: _without_folders(value) if name in options and options[name].path else value
        for name, value in settings.items()
        if name not in options or options[name].affects != "free"
    }
    sources = settings.get("data", ())
    model = str(settings.get("model", "tiny"))
    base = FAMILIES[model].hub_id if model in FAMILIES else _hub_id(model)
    front = ModelCardData(
        base_model=base,
        datasets=[source for source in sources if _hub_id(source)] or None,
        library_name="diffusers",
        pipeline_tag="image-to-image" if image_inputs else "text-to-image" if files.takes_text else _UNCONDITIONAL,
        tags=[TAG, *(["lora"] if files.adapter else [])],
    )
    kind = "A LoRA" if files.adapter else "A diffusion model"
    grid = "".join(f"![samples](samples/{path.name})\n\n" for path in grids_of(folder)[-1:])
    given = _literal(with_trigger(facts.get("prompt") or "", facts.get("trigger")) or "your prompt")
    given *= files.takes_text
    given += "".join(f', {name}=Image.open("{file}")' for name, file in image_inputs.items())
    imports = "from PIL import Image\n" * bool(image_inputs)
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {repository.split('/')[-1]}\n\n"
        f"{kind}, trained{f' from `{base}`' if base else ''} with finetune-unet.\n\n{grid}"
        f"```python\n{imports}{_loading(files.load.format(repository), files.adapter, model, base)}\n"
        f"image = pipeline({given}).images[0]\n```\n\n"
        f"Its settings, as a file for `finetune-unet --config`:\n\n```toml\n{tomli_w.dumps(facts)}```\n"
    )


def _loading(load: str, adapter: bool, model: str, base: str | None) -> str:
    """Python that makes a pipeline of the export, or of the base model with the adapter on it."""
    if not adapter:
        return f"from diffusers import DiffusionPipeline\n\npipeline = {load}"
    if model in FAMILIES and base is None:  # it lies in the package
        lines = ["import finetune", "", f'pipeline = finetune.load_model("{model}").pipeline()']
    else:
        made = f"DiffusionPipeline.from_pretrained({_literal(base or Path(model).name)})"
        local = "" if base else "  # a folder that is not on the hub"
        lines = ["from diffusers import DiffusionPipeline", "", f"pipeline = {made}{local}"]
    return "\n".join([*lines, load])


def _literal(text: str) -> str:
    """The text as a string literal of Python, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _hub_id(name: str) -> str | None:
    """`name` if it is a repository's, owner/name; None for a local folder."""
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) and not Path(name).exists() else None


def _without_folders(value: Any) -> Any:
    """A text, or each of several, by its last part where it is a path; a repository's name or a prompt as it is."""
    if not isinstance(value, str):
        return [_without_folders(each) for each in value]
    local = value.startswith(("/", "./", "../", "~")) or os.path.exists(value)
    return Path(value).name if local else value

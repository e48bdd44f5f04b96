"""Model card and upload to the Hugging Face hub."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli_w
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finetune.atomic_io import write_whole
from finetune.data.captions import with_trigger
from finetune.errors import RunError, UsageError, hub_errors
from finetune.models.families import FAMILIES
from finetune.options import option_info
from finetune.results.export import Exported, exported

TAG = "finetune-unet"
"""Of the model card: the repository was pushed from here."""
PUSHED = "pushed.json"
FILES = (PUSHED,)
"""Patterns of what is written into a run folder here."""
"""In a run folder, once it was pushed: where to."""

_GRID = re.compile(r"step-(\d+)\.png")


def check_login(repository: str | None = None) -> None:
    """Find out, without the network, what would make a push fail after hours of training.

    Args:
        repository: as `push` takes it.

    Raises:
        UsageError: no usable token, offline mode, or a name that no repository can have.
    """
    _token()
    if constants.HF_HUB_OFFLINE:
        raise UsageError("push_to_hub: HF_HUB_OFFLINE is set; unset it to push")
    try:
        validate_repo_id((repository or "any").encode("ascii").decode())  # older hub libraries let letters like é pass
    except (HFValidationError, UnicodeEncodeError) as error:
        allowed = "owner/name or name, of letters, digits and single '-', '_', '.'"
        raise UsageError(f"hub_model_id {repository!r}: expected {allowed}") from error


def push(
    folder: Path,
    repository: str | None,
    *,
    private: bool | None,
    settings: Mapping[str, Any],
    image_inputs: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Upload a run's export, sample grids and metrics with a model card; nothing else that lies in the folder.

    Args:
        folder: a run folder with an export.
        repository: "owner/name" or "name"; None: the folder's name under the logged-in account. One that exists and
            was not pushed by finetune is refused; where it goes by the folder's name, also one that another folder has
            pushed.
        private: create the repository as private, and refuse one that is public; False: create it as public; None:
            create it as private, and take one that is public as it is.
        settings: option -> value, for the card.
        image_inputs: argument of the pipeline -> name of an image file, of a model that is shown images.

    Returns:
        The repository's address.

    Raises:
        RunError: not logged in, or the hub refused or was out of reach; the export in the folder is whole.
    """
    try:
        check_login(repository)
        api = HfApi(token=_token())
        name = repository or repository_name(folder)
        address = _new_repository(api, name, private=private is not False)
        if address is None:
            address = api.create_repo(name, exist_ok=True)
            _refuse_other_repository(api, address, folder, named=repository is not None)
            if private and not api.model_info(address.repo_id).private:
                raise UsageError(f"{address} exists and is public; make it private, or give another --hub_model_id")
        write_whole(folder / PUSHED, json.dumps({"repository": address.repo_id}) + "\n")
        files = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in pushed_files(folder)]
        card = model_card(folder, address.repo_id, settings, image_inputs=image_inputs).encode(errors="replace")
        files.append(CommitOperationAdd("README.md", card))
        api.create_commit(address.repo_id, files, commit_message="Trained with finetune-unet")
    except (UsageError, *hub_errors(), ValueError, RuntimeError) as error:  # RuntimeError: a broken-off upload
        raise RunError(
            f"{folder} holds the complete export, but pushing failed (run the same command again): {_reason(error)}"
        ) from error
    return str(address)


_UNCONDITIONAL = "unconditional-image-generation"


def _new_repository(api: HfApi, name: str, *, private: bool) -> Any:
    """The address of a repository that is made now; None: there is one of that name."""
    try:
        return api.create_repo(name, private=private)
    except hub_errors() as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 409:
            return None
        raise


def _refuse_other_repository(api: HfApi, address: Any, folder: Path, *, named: bool) -> None:
    """Raise UsageError where pushing would write over what somebody else, or another run, has pushed."""
    record = folder / PUSHED
    if record.exists() and json.loads(record.read_text(encoding="utf-8")).get("repository") == address.repo_id:
        return
    info = api.model_info(address.repo_id)
    if [file for file in info.siblings or [] if file.rfilename != ".gitattributes"] == []:
        return
    if not named:
        raise UsageError(f"{address} exists already, of another run; give another name with --hub_model_id")
    if TAG not in (info.tags or []):
        raise UsageError(f"{address} exists already and was not pushed by finetune; give another --hub_model_id")


def _token() -> str:
    """The hub token. Raises UsageError where there is none that could be sent."""
    token = get_token()
    if not token:
        raise UsageError("push_to_hub: not logged in to the Hugging Face hub: run `hf auth login`, or set HF_TOKEN")
    if re.search(r"[^!-~]", token):  # the HTTP client would refuse it, and quote it
        raise UsageError("push_to_hub: the hub token has a character that no token has: run `hf auth login`")
    return token


def _reason(error: Exception) -> str:
    """What the hub or the network says, on one line and without the token."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(text.split()).replace(get_token() or "\n", "***")


def repository_name(folder: Path) -> str:
    """The folder's name in the letters that a repository's name may have."""
    return "-".join(re.findall(r"\w+", folder.resolve().name, re.ASCII))[:96].strip("-") or "finetune-unet"


def pushed_files(folder: Path) -> list[Path]:
    """What is pushed beside the card: the LoRA file or the parts of the pipeline, the metrics, the sample grids.

    Raises:
        RunError: nothing was exported to the folder.
    """
    others = [folder / "metrics.jsonl", *_grids(folder), folder / "samples/before-after.png"]
    return [*_exported(folder).files, *(path for path in others if path.exists())]


def _exported(folder: Path) -> Exported:
    files = exported(folder)
    if files is None:
        raise RunError(f"{folder}: there is no export to push")
    return files


def _grids(folder: Path) -> list[Path]:
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
    files = _exported(folder)
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
    grid = "".join(f"![samples](samples/{path.name})\n\n" for path in _grids(folder)[-1:])
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

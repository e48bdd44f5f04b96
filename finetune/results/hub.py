"""Upload of a run's result to the Hugging Face hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from finetune.atomic_io import write_whole
from finetune.errors import RunError, UsageError, hub_errors
from finetune.results.model_card import TAG, export_of, grids_of, model_card

PUSHED = "pushed.json"
"""File in a run folder that names the repository that it was pushed to."""
FILES = (PUSHED,)
"""Patterns of what is written into a run folder here."""


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
    others = [folder / "metrics.jsonl", *grids_of(folder), folder / "samples/before-after.png"]
    return [*export_of(folder).files, *(path for path in others if path.exists())]

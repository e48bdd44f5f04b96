"""ModelInfo: where a model is and of which family, from its JSON files alone. Free of torch and diffusers."""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ModelError, UsageError, hub_errors
from finetune.models.families import FAMILIES, Family
from finetune.models.known_parts import refuse_unknown_parts
from finetune.models.single_file import Checkpoint, inspect
from finetune.models.tiny import tiny_folder

HUB_FILES = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    "tokenizer_2/*.json",
    "tokenizer_2/merges.txt",
    "*/diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model.safetensors.index.json",
    "*/diffusion_pytorch_model-?????-of-?????.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
]
"""What a download takes of a repository: the parts that are used, in full precision, safetensors only."""

HUB_CONFIGS = ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder*/config.json"]

_FILES = {
    "unet": ("config.json",),
    "vae": ("config.json", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("config.json", "model.safetensors"),
    "tokenizer": ("tokenizer_config.json",),
    "scheduler": ("scheduler_config.json",),
}
"""What must lie in a part of a model, beside the UNet's weights, which may be sharded or in half precision."""


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be loaded."""

    name: str
    """As the user named it."""
    family: Family
    folder: Path | None
    """In diffusers layout; None: a checkpoint in one file, or a DDPM to be built from scratch."""
    resolution: int
    """Pixels per side that it was made for."""
    multiple: int
    """Height and width must be multiples of this many pixels."""
    checkpoint: Checkpoint | None = None
    """A model in one file."""

    @property
    def scratch(self) -> bool:
        """To be built, with nothing learned yet."""
        return self.folder is None and self.checkpoint is None


def check_name(name: str) -> None:
    """Raise UsageError for what can be neither a family, nor a local folder, nor a repository on the hub."""
    if name in FAMILIES or Path(name).expanduser().exists() or _may_be_on_the_hub(name):
        return
    matches = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f"; did you mean {matches[0]}?" if matches else ""
    raise UsageError(f"--model {name}: no such folder, and not one of {', '.join(FAMILIES)} or a hub id{hint}")


def _may_be_on_the_hub(name: str) -> bool:
    # runs/nope beside a folder runs is a misspelt folder, not an owner on the hub
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).parent.is_dir()


def locate(name: str) -> ModelInfo:
    """Find a model by family name, local folder or hub id (downloaded if it is not in the hub cache yet).

    Raises:
        UsageError: nothing has that name.
        ModelError: a part is missing, the kind is not supported, or the hub is out of reach.
    """
    check_name(name)
    if name == "ddpm":
        family = FAMILIES["ddpm"]
        return ModelInfo(name, family, folder=None, resolution=family.resolution, multiple=8)
    if name == "tiny":
        return _inspect(name, tiny_folder())
    if name in FAMILIES:
        return _from_hub(name, FAMILIES[name].hub_id or "")
    if Path(name).expanduser().is_dir():
        return _inspect(name, Path(name).expanduser())
    if Path(name).expanduser().exists():
        return _in_a_file(name, Path(name).expanduser())
    return _from_hub(name, name)


def scratch_multiple(resolution: int) -> int:
    """What a from-scratch DDPM's resolution must be a multiple of: 2 ** (number of halvings)."""
    return 8 if resolution <= 64 else 32


def _from_hub(name: str, hub_id: str) -> ModelInfo:
    configs = _download(hub_id, HUB_CONFIGS)  # before gigabytes are fetched in vain
    _kind(name, configs)
    refuse_unknown_parts(name, configs)
    return _inspect(name, _download(hub_id, HUB_FILES))


def _download(hub_id: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"--model {hub_id}: no such folder here and no such repository on the hub "
            "(for a private one: hf auth login)"
        ) from error
    except (*hub_errors(), RuntimeError) as error:  # RuntimeError: a download that broke off
        raise ModelError(
            f"--model {hub_id}: the Hugging Face hub was not reachable and the model is not in its local cache; "
            "give a local diffusers folder instead: --model /path/to/folder"
        ) from error


_CLASSES = {
    "unet": "UNet2DConditionModel|UNet2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel|CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer|CLIPTokenizerFast",
    "scheduler": r"\w+Scheduler",
}
"""What a part of a folder may be, as its index says it; all are classes of diffusers or transformers."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ModelError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable: {error}") from error


def _kind(name: str, folder: Path) -> dict[str, Any]:
    """The UNet's config. Raises ModelError unless it is of a kind that can be trained."""
    if not (folder / "unet/config.json").is_file():
        what = "a LoRA, give its base model" if list(folder.glob("*lora*.safetensors")) else "not a diffusers folder"
        raise ModelError(f"--model {name}: part missing: unet/config.json ({what})")
    unet = read_json(folder / "unet/config.json")
    kind = unet.get("_class_name")
    if kind not in ("UNet2DModel", "UNet2DConditionModel"):
        raise ModelError(
            f"--model {name}: only Stable Diffusion 1, 2 and XL and DDPM folders can be trained, not {kind}"
        )
    return unet


def _refuse_other_classes(name: str, folder: Path, family: Family) -> None:
    """Raise ModelError where the folder's index wants a part to be something else than it is made as here.

    Nothing that an index names is ever imported; what a class of somebody's own would do is not what is trained.
    """
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if not isinstance(index, dict):
        raise ModelError(f"--model {name}: model_index.json is not a table of parts")
    for part in family.components:
        class_name, expected = index.get(part), _CLASSES[part.removesuffix("_2")]
        if class_name in (None, [None, None]):
            continue
        kind = ".".join(map(str, class_name)) if isinstance(class_name, list) else str(class_name)
        if not re.fullmatch(rf"(diffusers|transformers)\.({expected})", kind):
            raise ModelError(
                f"--model {name}: model_index.json has {kind} as its {part}; no code of a model folder is run; "
                f"expected {expected.replace('|', ', ')}"
            )


def _inspect(name: str, folder: Path) -> ModelInfo:
    unet = _kind(name, folder)
    family = _family(name, unet)
    _refuse_other_classes(name, folder, family)
    refuse_unknown_parts(name, folder)
    for file in _needed(folder, family):
        if not (folder / file).is_file():
            raise ModelError(f"--model {name}: part missing: {file}")
    blocks = len(_listed(unet, "block_out_channels", folder / "unet/config.json"))
    if not family.latent:
        return ModelInfo(
            name, family, folder=folder, resolution=_side(unet, family.resolution), multiple=2 ** (blocks - 1)
        )
    vae = read_json(folder / "vae/config.json")
    family = _as_it_takes(name, family, unet.get("in_channels"), vae.get("latent_channels"))
    factor = 2 ** (len(_listed(vae, "block_out_channels", folder / "vae/config.json")) - 1)
    multiple = max(factor, 8)  # less than 8 is what pipelines refuse
    return ModelInfo(
        name, family, folder=folder, resolution=_side(unet, family.resolution // factor) * factor, multiple=multiple
    )


def _in_a_file(name: str, path: Path) -> ModelInfo:
    """A checkpoint in one file."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"--model {name}: a pickle can run arbitrary code and is not loaded; to convert its tensors: "
            f"finetune-unet convert --file {name} --to {path.with_suffix('.safetensors')}"
        )
    checkpoint = inspect(path)
    unet = checkpoint.configs["unet"]
    family = _as_it_takes(name, FAMILIES[checkpoint.family], unet["in_channels"], 4)
    return ModelInfo(name, family, folder=None, resolution=unet["sample_size"] * 8, multiple=8, checkpoint=checkpoint)


def _as_it_takes(name: str, family: Family, channels: Any, latents: Any) -> Family:
    """The family, or its variant with an image condition, by how many channels the UNet takes and the VAE gives."""
    plain = FAMILIES[family.variant_of or family.name]
    if channels == latents:
        return plain
    base = plain.name.removesuffix("-base")
    for variant in FAMILIES.values():
        if variant.variant_of == base and latents and channels == latents + variant.condition_channels(latents):
            return variant
    raise ModelError(
        f"--model {name}: its UNet takes {channels} channels and its VAE gives {latents}; UNets that take more "
        "are trained only where they inpaint (9 for 4)"
    )


def _family(name: str, unet: dict[str, Any]) -> Family:
    """The kind of model, by its UNet's config; by its name only where that is one of ours."""
    if unet["_class_name"] == "UNet2DModel":
        return FAMILIES["ddpm"]
    if unet.get("addition_embed_type") == "text_time":
        return FAMILIES["sdxl"]
    return FAMILIES.get(name, FAMILIES["sd21" if unet.get("use_linear_projection") else "sd15"])


def _needed(folder: Path, family: Family) -> Iterator[str]:
    """The files that a model of this kind cannot be loaded without."""
    if not family.latent:
        yield "unet/diffusion_pytorch_model.safetensors"
    for part in family.components:
        yield from (f"{part}/{file}" for file in _FILES[part.removesuffix("_2")])
        # Without either, transformers makes a tokenizer of two words, and says nothing.
        if part.startswith("tokenizer") and not (folder / part / "tokenizer.json").is_file():
            yield from (f"{part}/vocab.json", f"{part}/merges.txt")


def _listed(config: dict[str, Any], key: str, path: Path) -> list[Any]:
    if not isinstance(config.get(key), list) or not config[key]:
        raise ModelError(f"{path}: {key} is {config.get(key)!r}, expected a list")
    return config[key]


def _side(unet: dict[str, Any], default: int) -> int:
    size = unet.get("sample_size")
    return min(size) if isinstance(size, list) else size or default

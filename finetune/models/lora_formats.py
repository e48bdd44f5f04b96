"""The two formats of LoRA files, and conversion between them.

peft, read by diffusers: `unet.MODULE.lora_A.weight` and `.lora_B.weight`, rank and alpha in the metadata.
kohya, read by sd-scripts, ComfyUI, A1111, Forge and diffusers: `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight`
and a number `.alpha` for each MODULE, whose dots are underscores. LoHa and LoKr have the same names in both for their
factors; DoRA's norms are `.dora_scale` in kohya's, and stand as a column.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.errors import ModelError
from finetune.models.lora_dialects import normalized
from finetune.models.lora_keys import family_layers
from finetune.models.lora_math import MAGNITUDE, MAGNITUDE_OF_INPUTS, lacking, rank_of
from finetune.models.tensor_file import data_digest, write_tensors

PEFT_PREFIX = "unet."
KOHYA_PREFIX = "lora_unet_"
_WIDTHS = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Numbers in each token of a prompt's embedding -> family."""
_FACTORS = (
    *(f"hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
)
_STEMS = {"loha": "hada_", "lokr": "lokr_"}
_SUFFIXES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", MAGNITUDE: "dora_scale"}
_SUFFIXES |= {MAGNITUDE_OF_INPUTS: "dora_scale"} | dict(zip(_FACTORS, _FACTORS, strict=True))
"""peft's name of a tensor -> kohya's."""


def to_kohya(state: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of a peft file under kohya's keys, with alpha beside them.

    Args:
        state: peft key -> tensor.
        alphas: layer -> alpha; its update is scaled by alpha / rank.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, suffix = _parted(key.removeprefix(PEFT_PREFIX), _SUFFIXES)
        name = KOHYA_PREFIX + module.replace(".", "_")
        if suffix == MAGNITUDE:  # (out,) of a linear layer, (1, out, 1, 1) of a convolution
            tensor = tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1))
        converted[f"{name}.{_SUFFIXES[suffix]}"] = tensor
        converted[f"{name}.alpha"] = torch.tensor(float(alphas[module]))
    return converted


def from_kohya(state: Mapping[str, Tensor], names: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a kohya file under peft's keys, and alpha of each module.

    Args:
        state: kohya key -> tensor.
        names: as `finetune.models.lora_keys.layer_names` gives them; the underscores of a key could be dots or
            underscores.

    Raises:
        ModelError: a key belongs to none of the layers, or is of another kind.
    """
    by_name = {KOHYA_PREFIX + name.replace(".", "_"): module for name, module in names.items()}
    back = {theirs: ours for ours, theirs in _SUFFIXES.items() if ours != MAGNITUDE_OF_INPUTS}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name, _, suffix = key.partition(".")
        if name not in by_name or suffix not in {*back, "alpha"}:
            raise ModelError(f"{key}: no LoRA tensor for this UNet")
        if suffix == "dora_scale" and tensor.shape[0] == 1 < tensor.numel():
            tensors[f"{PEFT_PREFIX}{by_name[name]}.{MAGNITUDE_OF_INPUTS}"] = tensor
        elif suffix == "dora_scale":
            tensors[f"{PEFT_PREFIX}{by_name[name]}.{MAGNITUDE}"] = _magnitude(tensor)
        elif suffix == "alpha":
            if tensor.numel() != 1:
                raise ModelError(f"{key}: {tuple(tensor.shape)}; alpha is one number")
            alphas[by_name[name]] = tensor.item()
        else:
            tensors[f"{PEFT_PREFIX}{by_name[name]}.{back[suffix]}"] = tensor
    return tensors, alphas


def _magnitude(scale: Tensor) -> Tensor:
    """A column of norms in peft's shape."""
    return scale.flatten() if scale.ndim <= 2 else scale.reshape(1, -1, 1, 1)


def _parted(key: str, suffixes: Iterable[str]) -> tuple[str, str]:
    """ "MODULE.SUFFIX" -> its two parts. Raises ModelError for a tensor of another kind."""
    for suffix in suffixes:
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    raise ModelError(f"{key}: not a tensor of a LoRA")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a UNet, from a file in either layout."""

    tensors: Mapping[str, Tensor]
    """peft's key -> tensor."""
    alphas: Mapping[str, float]
    """Layer -> alpha; those that say none have alpha = rank."""
    text_tensors: int
    """Tensors for text encoders, which are not among them."""
    layout: Literal["kohya", "peft"] = "peft"
    """That of the file."""

    @property
    def family(self) -> str | None:
        """Which family it was made for, where it has a layer that tells."""
        return told_family(self.tensors)

    @property
    def kind(self) -> str:
        """What its tensors are: "lora", "dora", "loha" or "lokr"; a rank-stabilised LoRA is one with another alpha."""
        ends = {key.rpartition(".")[2] for key in self.tensors}
        if {MAGNITUDE, MAGNITUDE_OF_INPUTS} & ends:
            return "dora"
        return next((kind for kind in ("loha", "lokr") if any(e.startswith(_STEMS[kind]) for e in ends)), "lora")

    def ranks(self) -> dict[str, int | None]:
        """Layer -> rank."""
        return {layer: rank_of(tensors) for layer, tensors in self.layers().items()}

    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> its tensors by peft's names, as `finetune.models.lora_math` takes them."""
        by_layer: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            layer, suffix = _parted(key.removeprefix(PEFT_PREFIX), _SUFFIXES)
            by_layer.setdefault(layer, {})[suffix] = tensor
        return by_layer


def read_lora(path: Path, names: Mapping[str, str] | None = None) -> LoraFile:
    """A LoRA file in kohya's or peft's layout.

    Args:
        path: a safetensors file.
        names: of the UNet's layers, as `from_kohya` takes them. None: those of the family that it was made for.

    Raises:
        ModelError: it is damaged, has numbers that are not finite, mixes the layouts, or is no LoRA for this UNet.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # no dict
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")) or {}
    except SafetensorError as error:
        raise ModelError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    try:
        ours, text = normalized(state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if broken := [key for key, tensor in ours.items() if not tensor.float().isfinite().all()]:
        raise ModelError(f"{path}: {broken[0]} is not finite")
    kohya = [key for key in ours if key.startswith(KOHYA_PREFIX)]
    if kohya and len(kohya) < len(ours):
        other = next(key for key in ours if key not in kohya)
        raise ModelError(f"{path} mixes two layouts: {kohya[0]} and {other}")
    if kohya and names is None:
        names = family_layers(_family(path, ours))[0]
    try:
        if kohya:
            tensors, alphas = from_kohya(ours, names or {})
            lora = LoraFile(tensors, alphas, text, "kohya")
        else:
            state = {f"{PEFT_PREFIX}{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in ours.items()}
            lora = LoraFile(state, {}, text)
        layers = lora.layers()
        if not layers:
            raise ModelError("it has no tensors for a UNet")
        for layer, tensors in layers.items():
            if name := lacking(tensors):
                raise ModelError(f"{layer}.{name} is missing")
    except ModelError as error:
        family = told_family(ours)
        raise ModelError(f"{path}: {error}{f'; it was made for {family}' if family else ''}") from error
    return lora if kohya else replace(lora, alphas=_told_alphas(settings or _settings_beside(path), layers))


def _settings_beside(path: Path) -> dict[str, Any]:
    """What peft itself, without diffusers, says of an adapter: in a file of its own."""
    try:
        settings = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {f"{PEFT_PREFIX}{name}": value for name, value in settings.items()} if isinstance(settings, dict) else {}


def told_family(tensors: Mapping[str, Tensor]) -> str | None:
    """Which family a LoRA in either layout was made for, by the width of the prompts that its layers read."""
    ends = tuple(
        f"attn2{dot}to_k.{name}" for dot in "._" for name in ("lora_A.weight", "lora_down.weight", "hada_w1_b")
    )
    widths = {tensor.shape[1] for key, tensor in tensors.items() if key.endswith(ends)}
    return next((family for width, family in _WIDTHS.items() if width in widths), None)


def _family(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if (family := told_family(tensors)) is None:
        raise ModelError(f"{path}: its tensors do not show which model it is for; give --model")
    return family


def _told_alphas(settings: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Layer -> alpha as kohya's layout counts it, from the settings in a peft file; none there: none."""
    alpha = settings.get(f"{PEFT_PREFIX}lora_alpha", settings.get(f"{PEFT_PREFIX}alpha"))
    if alpha is None:
        return {}
    patterns: Mapping[str, Any] = settings.get(f"{PEFT_PREFIX}alpha_pattern") or {}
    stabilised = bool(settings.get(f"{PEFT_PREFIX}use_rslora"))

    def own(layer: str) -> float:
        """As peft finds it: the first pattern that fits the whole name, or its end."""
        return float(next((a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), alpha))

    return {
        layer: own(layer) * (sqrt(rank_of(tensors) or 1) if stabilised else 1.0) for layer, tensors in layers.items()
    }


_LYCORIS = {"dora": "locon", "loha": "loha", "lokr": "lokr"}
"""What LyCORIS, the network module of sd-scripts that knows them, calls the kinds that sd-scripts itself has not."""


def write_kohya(path: Path, lora: LoraFile, metadata: Mapping[str, str], rank: int | None = None) -> None:
    """Write a file in kohya's layout.

    Args:
        path: the file.
        lora: what to write.
        metadata: metadata, beside what the tensors themselves say.
        rank: that was asked for; None: the most frequent.
    """
    tensors = to_kohya(lora.tensors, lora.alphas)
    digest, algorithm = data_digest(tensors), _LYCORIS.get(lora.kind)
    defaults = {
        "ss_network_module": "lycoris.kohya" if algorithm else "networks.lora",
        "ss_network_dim": str(rank or _usual(lora.ranks().values())),
        "ss_network_alpha": f"{_usual(lora.alphas.values()):g}",
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
    }
    if algorithm:
        arguments = {"algo": algorithm} | ({"dora_wd": True} if lora.kind == "dora" else {})
        defaults["ss_network_args"] = json.dumps(arguments)
    write_tensors(path, tensors, dict(metadata) | defaults)


def write_peft(path: Path, lora: LoraFile) -> None:
    """Write a file in peft's layout, rank and alpha of each layer in its metadata. Raises ModelError for a LoKr."""
    if any(key.endswith(MAGNITUDE_OF_INPUTS) for key in lora.tensors):
        raise ModelError("its DoRA has a norm for each input, where peft's has one for each output; keep to kohya")
    if lora.kind == "lokr":
        raise ModelError("a LoKr does not say how its layers were factored, which peft needs to know; keep to kohya")
    ranks, alphas = lora.ranks(), lora.alphas
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    settings: dict[str, Any] = {
        "peft_type": "LOHA" if lora.kind == "loha" else "LORA",
        "r": rank,
        "alpha" if lora.kind == "loha" else "lora_alpha": alpha,
        "rank_pattern": {layer: own for layer, own in ranks.items() if own != rank},
        "alpha_pattern": {layer: own for layer, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
    }
    settings |= {"use_dora": True} if lora.kind == "dora" else {}
    metadata = {f"{PEFT_PREFIX}{name}": value for name, value in settings.items()}
    write_tensors(path, lora.tensors, {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)})


def _usual(numbers: Iterable[Any]) -> Any:
    """The most frequent one."""
    return Counter(number for number in numbers if number is not None).most_common(1)[0][0]

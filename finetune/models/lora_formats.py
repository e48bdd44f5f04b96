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
from finetune.models.lora_math import (
    MAGNITUDE,
    MAGNITUDE_OF_INPUTS,
    MAGNITUDE_OVER_BASE,
    MAGNITUDES,
    lacking,
    rank_of,
)
from finetune.models.tensor_file import stream_tensors, write_tensors

METADATA_KEY = "lora_adapter_metadata"
"""Entry of a peft file's metadata that holds its settings as JSON, since diffusers 0.35."""
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
_SUFFIXES |= dict.fromkeys(MAGNITUDES, "dora_scale") | dict(zip(_FACTORS, _FACTORS, strict=True))
"""peft's name of a tensor -> kohya's."""
_DORA_NORM = "finetune.dora_norm"
"""Entry of a kohya file's metadata that is "base" where its DoRA is one for ComfyUI and Forge."""


def to_kohya(state: Mapping[str, Tensor], alphas: Mapping[str, float], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a peft file under kohya's keys, with alpha beside them.

    Args:
        state: peft key -> tensor.
        alphas: layer -> alpha; its update is scaled by alpha / rank.
        names: layer -> its name in the file, as `finetune.models.lora_keys.kohya_names` gives them.
    """
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, suffix = _parted(key.removeprefix(PEFT_PREFIX), _SUFFIXES)
        name = KOHYA_PREFIX + names[module].replace(".", "_")
        if suffix in (MAGNITUDE, MAGNITUDE_OVER_BASE):  # (out,) of a linear layer, (1, out, 1, 1) of a convolution
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
    back = {theirs: ours for ours, theirs in _SUFFIXES.items() if ours not in MAGNITUDES}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name, _, suffix = key.partition(".")
        if name not in by_name or suffix not in {*back, "alpha", "dora_scale"}:
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
        factored = (kind for kind in ("loha", "lokr") if any(end.startswith(_STEMS[kind]) for end in ends))
        return next(factored, "dora" if self.has_norms else "lora")

    @property
    def has_norms(self) -> bool:
        """Whether it has the norms of a DoRA, which LyCORIS trains of a LoHa or LoKr, too."""
        return any(key.endswith(MAGNITUDES) for key in self.tensors)

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
            metadata = file.metadata() or {}
            settings = json.loads(metadata.get(METADATA_KEY, "{}")) or {}
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
        names = family_layers(_family(path, ours)).names
    try:
        if kohya:
            tensors, alphas = from_kohya(ours, names or {})
            if metadata.get(_DORA_NORM) == "base":
                tensors = {key.replace(f".{MAGNITUDE}", f".{MAGNITUDE_OVER_BASE}"): t for key, t in tensors.items()}
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
    if kohya:
        return lora
    return _without_padding(replace(lora, alphas=_told_alphas(settings or _settings_beside(path), layers)))


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


def write_kohya(
    path: Path, lora: LoraFile, metadata: Mapping[str, str], names: Mapping[str, str], rank: int | None = None
) -> None:
    """Write a file in kohya's layout.

    Args:
        path: the file.
        lora: what to write.
        metadata: metadata, beside what the tensors themselves say.
        names: layer -> its name in the file, see `to_kohya`.
        rank: that was asked for; None: the most frequent.
    """
    tensors = to_kohya(lora.tensors, lora.alphas, names)
    algorithm = _LYCORIS.get(lora.kind)
    defaults = {
        "ss_network_module": "lycoris.kohya" if algorithm else "networks.lora",
        "ss_network_dim": str(rank or _usual(lora.ranks().values())),
        "ss_network_alpha": f"{_usual(lora.alphas.values()):g}",
    }
    if algorithm:
        dora = {"dora_wd": True, "wd_on_output": not _has(lora, MAGNITUDE_OF_INPUTS)} if lora.has_norms else {}
        defaults["ss_network_args"] = json.dumps({"algo": algorithm} | dora)
    if _has(lora, MAGNITUDE_OVER_BASE):
        defaults[_DORA_NORM] = "base"
    stream_tensors(path, tensors.items, dict(metadata) | defaults, digests=True)


def write_peft(path: Path, lora: LoraFile, more: Mapping[str, Any] | None = None) -> None:
    """Write a file in peft's layout, with the few settings in its metadata that every version of peft knows.

    A LoRA or DoRA is written as `uniform` makes it, so that it means the same to programs that read no metadata.

    Args:
        path: the file.
        lora: what to write.
        more: entries of the metadata in addition to the settings; diffusers reads only those that begin with "unet.".

    Raises:
        ModelError: a LoKr, a LoHa with norms, or a DoRA for other programs.
    """
    if _has(lora, MAGNITUDE_OVER_BASE):
        raise ModelError("its DoRA is written for ComfyUI and Forge; give the file that the run wrote for diffusers")
    if _has(lora, MAGNITUDE_OF_INPUTS):
        raise ModelError("its DoRA has a norm for each input, where peft's has one for each output; keep to kohya")
    if lora.kind == "lokr":
        raise ModelError("a LoKr does not say how its layers were factored, which peft needs to know; keep to kohya")
    if lora.kind == "loha" and lora.has_norms:
        raise ModelError("it is a LoHa with the norms of a DoRA, which peft has not; keep to kohya")
    lora = lora if lora.kind == "loha" else uniform(lora)
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
    write_peft_tensors(path, lora.tensors, settings, more or {})


def write_peft_tensors(
    path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Write a file in peft's layout with these settings of peft's, and more entries of its metadata."""
    metadata = {f"{PEFT_PREFIX}{name}": value for name, value in settings.items()} | dict(more)
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True, default=sorted)})


def uniform(lora: LoraFile) -> LoraFile:
    """A LoRA or DoRA with the same updates and one rank for all layers, which is alpha, too.

    Alpha goes into B, and the factors of layers with a lower rank are filled up with zeros. diffusers reads the
    settings of a peft file since 0.35. Before, it took the rank of the first layer for the alpha of all.
    """
    rank = max(rank for rank in lora.ranks().values() if rank)
    tensors: dict[str, Tensor] = dict(lora.tensors)
    for layer, factors in lora.layers().items():
        a, b = (factors[f"lora_{factor}.weight"] for factor in "AB")
        scale, missing = lora.alphas[layer] / a.shape[0], rank - a.shape[0]
        if scale != 1:
            b = (b.float() * scale).to(b.dtype)
        if missing:
            a = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
            b = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
        tensors |= {f"{PEFT_PREFIX}{layer}.lora_A.weight": a, f"{PEFT_PREFIX}{layer}.lora_B.weight": b}
    return replace(lora, tensors=tensors, alphas=dict.fromkeys(lora.alphas, float(rank)))


def _without_padding(lora: LoraFile) -> LoraFile:
    """A LoRA without the zeros that `uniform` has filled up factors with, and alphas for the ranks that are left."""
    tensors, alphas = dict(lora.tensors), dict(lora.alphas)
    for layer, factors in lora.layers().items():
        if "lora_A.weight" not in factors:
            continue
        a, b = factors["lora_A.weight"], factors["lora_B.weight"]
        used = a.flatten(1).any(1) | b.transpose(0, 1).flatten(1).any(1)
        rank = int(used.nonzero().max()) + 1 if used.any() else len(used)
        if rank < len(used):
            tensors[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = a[:rank].contiguous()
            tensors[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = b[:, :rank].contiguous()
            alphas[layer] = alphas.get(layer, float(len(used))) * rank / len(used)
    return replace(lora, tensors=tensors, alphas=alphas)


def _has(lora: LoraFile, name: str) -> bool:
    """Whether a tensor of this name is in the file."""
    return any(key.endswith(f".{name}") for key in lora.tensors)


def _usual(numbers: Iterable[Any]) -> Any:
    """The most frequent one."""
    return Counter(number for number in numbers if number is not None).most_common(1)[0][0]

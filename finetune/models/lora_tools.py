"""Operations on LoRA files apart from training: open, verify, merge, resize, extract."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.errors import ModelError, RunError, UsageError
from finetune.models.lora_formats import LoraFile, read_lora, uniform, write_kohya, write_peft
from finetune.models.lora_keys import UNETS, UNetLayers, family_layers, layers_of
from finetune.models.lora_math import changed, factors, update
from finetune.models.model_info import locate
from finetune.models.source import open_source

Layout = Literal["kohya", "peft"]


def open_lora(path: Path, model: str | None = None, *, option: str = "--file") -> LoraFile:
    """A LoRA file, whose layers are those of `model` or, by default, of the family that its tensors tell.

    `option` names it in a message.

    Raises:
        UsageError: there is no such file.
        ModelError: it is damaged, or no LoRA for that UNet.
    """
    if not path.is_file():
        raise UsageError(f"{option} {path}: no such file")
    return read_lora(path, None if model is None else _layers_of(model).names)


def check_layers(path: Path, lora: LoraFile, model: str | None) -> None:
    """Compare the layers of a LoRA with those of a UNet, by name and shape.

    Raises:
        ModelError: neither `model` nor the file tells which UNet, or a layer is none of it, or has another shape.
    """
    shapes = layers_for(lora, model).shapes
    whose = f"--model {model}" if model is not None else lora.family
    for layer, tensors in lora.layers().items():
        if layer not in shapes:
            raise ModelError(f"{path}: {layer} is no layer of the UNet of {whose}")
        try:
            matches = update(tensors, None, shapes[layer]).shape == shapes[layer]
        except RuntimeError:
            matches = False
        if not matches:
            made = f"; it was made for {lora.family}" if lora.family else ""
            raise ModelError(f"{path}: {layer} does not fit its shape {tuple(shapes[layer])} in {whose}{made}")


def layers_for(lora: LoraFile, model: str | None) -> UNetLayers:
    """The layers of the UNet that a LoRA is for. Raises ModelError where neither `model` nor the file tells."""
    if model is not None:
        return _layers_of(model)
    if lora.family is None:
        raise ModelError("which model the LoRA was made for does not show in its tensors; give --model")
    return family_layers(lora.family)


def _layers_of(model: str) -> UNetLayers:
    if model in UNETS:
        return family_layers(model)  # which needs neither its files nor the hub
    model_info = locate(model)
    if model_info.scratch or not model_info.family.latent:
        raise UsageError(f"--model {model}: a pixel-space model takes no LoRA")
    return layers_of(open_source(model_info).config("unet"))


def write_lora(
    path: Path,
    lora: LoraFile,
    layout: Layout,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    *,
    names: Mapping[str, str],
) -> None:
    """Write a LoRA, read it back and compare it to the bit.

    Args:
        path: the file.
        lora: what to write.
        layout: that of the file.
        dtype: number format of its tensors.
        metadata: of a kohya file, see `write_kohya`.
        names: layer -> its name in a kohya file.

    Raises:
        RunError: what was read back is not what was to be written; the file is kept as `.rejected`.
        ModelError: as `write_peft`.
    """
    lora = replace(lora, alphas={layer: lora.alphas.get(layer, float(r or 1)) for layer, r in lora.ranks().items()})
    in_one_rank = layout == "peft" and lora.kind in ("lora", "dora")
    if in_one_rank:
        lora = uniform(lora)
    alphas = lora.alphas
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in lora.tensors.items()}
    rounded = replace(lora, tensors=tensors)
    if layout == "kohya":
        write_kohya(path, rounded, metadata, names)
    else:
        write_peft(path, rounded)
    try:
        back = read_lora(path, {names[layer]: layer for layer in alphas})
        back = uniform(back) if in_one_rank else back  # reading takes the zeros off that fill up a lower rank
        wrong = [key for key in tensors if key not in back.tensors or not torch.equal(back.tensors[key], tensors[key])]
        wrong += [f"{n}.alpha" for n, alpha in alphas.items() if _in_fp32(back.alphas[n]) != _in_fp32(alpha)]
        if wrong:
            raise RunError(f"{path} does not read back to what was written: {wrong[0]} differs")
    except (RunError, ModelError):
        path.rename(path.with_name(f"{path.name}.rejected"))
        raise


def _in_fp32(number: float) -> float:
    """What is left of a number in a kohya file."""
    return torch.tensor(number).item()


@torch.no_grad()
def merge(unet: Any, lora: LoraFile, strength: float) -> None:
    """Put a LoRA into the weights of a UNet, `strength` times. Raises ModelError for a layer that it has not."""
    weights = dict(unet.named_parameters())
    for layer, tensors in lora.layers().items():
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise ModelError(f"the model has no layer {layer}")
        try:
            merged = changed(weight, tensors, lora.alphas.get(layer), strength)
        except RuntimeError as error:
            base = lora.family or "another model"
            raise ModelError(f"{layer} is {tuple(weight.shape)} here; the LoRA is for {base}") from error
        weight.copy_(merged)


def merge_files(
    unet: Any, files: Sequence[str], strengths: Sequence[float], model: str, *, option: str
) -> list[tuple[Path, LoraFile]]:
    """Put LoRA files into the weights of a UNet without adapters, each with its strength (none: 1).

    Args:
        unet: of `model`.
        files: their paths.
        strengths: one for each, or none.
        model: the base, as for training.
        option: which names the files.

    Returns:
        Each path, and what was found there.

    Raises:
        UsageError: no such file.
        ModelError: a file is damaged, or for another model.
    """
    paths = [Path(file).expanduser() for file in files]
    merged = []
    for path, strength in zip(paths, strengths or (1.0,) * len(paths), strict=True):
        lora = open_lora(path, model, option=option)
        try:
            merge(unet, lora, strength)
        except ModelError as error:
            raise ModelError(f"{path} does not fit --model {model}: {error}") from error
        merged.append((path, lora))
    return merged


def shortened(
    lora: LoraFile, shapes: Mapping[str, torch.Size] | None, rank: int | None, energy: float
) -> tuple[LoraFile, float]:
    """A LoRA of lower rank, and the share of the update's squares that it keeps; see `factors`.

    Args:
        lora: LoRA, LoHa or LoKr.
        shapes: of the layers' weights; a LoRA needs none.
        rank: the highest.
        energy: share of the squares to keep in each layer.

    Raises:
        ModelError: a DoRA, whose norms no plain LoRA has.
    """
    if lora.has_norms:
        raise ModelError("a DoRA's norms do not fit into a LoRA of another rank; merge it, and extract a LoRA")
    made: dict[str, dict[str, Tensor]] = {}
    energy_kept, energy_total = 0.0, 0.0
    for layer, tensors in lora.layers().items():
        alpha = lora.alphas.get(layer)
        if shapes is None:
            up, down = tensors["lora_B.weight"], tensors["lora_A.weight"]
            shape = torch.Size((up.shape[0], *down.shape[1:]))
        else:
            shape = shapes[layer]
        made[layer], share = factors(tensors, alpha, shape, rank=rank, energy=energy)
        size = _squares(made[layer])
        energy_kept, energy_total = energy_kept + size, energy_total + size / max(share, 1e-30)
    return _from_layers(made), energy_kept / energy_total if energy_total else 1.0


def difference(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], layers: Iterable[str], rank: int | None, energy: float
) -> tuple[LoraFile, float, int]:
    """What was learned between two UNets, as a LoRA.

    Args:
        tuned: state dict of what was trained.
        base: state dict of what it was trained from.
        layers: names of the layers to take.
        rank: the highest.
        energy: share of the squares to keep in each layer.

    Returns:
        The LoRA; the share of the squares of all differences that it keeps; and how many tensors changed that are in
        none of the layers.
    """
    made: dict[str, dict[str, Tensor]] = {}
    energy_kept, energy_total, left = 0.0, 0.0, 0
    layer_of = {f"{layer}.weight": layer for layer in layers}
    for name, weight in tuned.items():
        delta = weight.float() - base[name].float()
        size = delta.square().sum().item()
        energy_total += size
        if size and name in layer_of:
            layer = layer_of[name]
            made[layer], share = factors({"": delta}, None, delta.shape, rank=rank, energy=energy)
            energy_kept += share * size
        else:
            left += size > 0
    if not made:
        raise UsageError("the two models do not differ in any layer that a LoRA could take")
    return _from_layers(made), energy_kept / energy_total, left


def _squares(tensors: Mapping[str, Tensor]) -> float:
    """The sum of an update's squares, from its factors: of a balanced pair, that of the singular values."""
    return tensors["lora_A.weight"].flatten(1).norm(dim=1).pow(4).sum().item()


def _from_layers(layers: Mapping[str, Mapping[str, Tensor]]) -> LoraFile:
    """Factors for alpha = rank as a LoRA with one alpha: diffusers reads files with several wrongly."""
    ranks = {layer: some["lora_A.weight"].shape[0] for layer, some in layers.items()}
    alpha = float(max(ranks.values()))
    tensors: dict[str, Tensor] = {}
    for layer, some in layers.items():
        tensors[f"unet.{layer}.lora_A.weight"] = some["lora_A.weight"]
        tensors[f"unet.{layer}.lora_B.weight"] = some["lora_B.weight"] * (ranks[layer] / alpha)
    return LoraFile(tensors, dict.fromkeys(layers, alpha), 0)

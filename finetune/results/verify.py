"""Load an export back through diffusers and compare it with the model it came from."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import seeding
from finetune.batch import map_tensors
from finetune.errors import RunError
from finetune.models.loading import DiffusionModel, without_library_bars
from finetune.models.lora import LORA_FILE, Adapter
from finetune.models.lora_layouts import PEFT_PREFIX

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest allowed difference of the outputs, relative to the largest output: a few roundings of the UNet's dtype.

The weights themselves are compared to the bit.
"""


def verify_export(model: DiffusionModel, folder: Path) -> float:
    """Compare the UNet with the export of it in `folder`: every weight, and the output on a fixed input.

    Returns:
        The largest difference of the outputs, relative to the largest output; at most what `TOLERANCES` allows.

    Raises:
        RunError: a weight is missing, unexpected or differs, or the outputs do.
    """
    model.unet.eval()
    adapter = Adapter.of(model.unet)
    differing, difference = _compare_adapter(adapter, model, folder) if adapter else _compare_pipeline(model, folder)
    _refuse(folder, differing, difference, model.unet.dtype)
    return difference


def _compare_adapter(adapter: Adapter, model: DiffusionModel, folder: Path) -> tuple[list[str], float]:
    """Compares the file's tensors, then the outputs with the file loaded as a second adapter on the same base."""
    differing = _differing(adapter.state(), load_file(folder / LORA_FILE, device=str(model.unet.device)))
    with adapter.rounded():
        trained = _answer(model)
    with adapter.replaced_by_file(folder):
        return differing, _distance(trained, _answer(model))


def verify_kohya(model: DiffusionModel, path: Path) -> float:
    """Compare the adapter on the UNet with a kohya file of it.

    Every tensor and alpha is read back by the layout's definition, and compared to the bit; then diffusers' own
    converter loads the file, and the outputs are compared.

    Returns, raises: as `verify_export`.
    """
    adapter = Adapter.of(model.unet)
    assert adapter is not None
    model.unet.eval()
    differing = differing_from_kohya(adapter, path)
    with adapter.rounded():
        trained = _answer(model)
    difference = float("inf")
    if not differing:
        with adapter.replaced_by_kohya(path):
            difference = _distance(trained, _answer(model))
    _refuse(path, differing, difference, model.unet.dtype)
    return difference


def differing_from_kohya(adapter: Adapter, path: Path) -> list[str]:
    """The tensors and alphas that a kohya file has otherwise than the adapter, or not, or beside it."""
    tensors, alphas = adapter.read_kohya(path)
    state = adapter.state()
    layers = {key.rsplit(".lora_", 1)[0].removeprefix(PEFT_PREFIX) for key in state}
    alpha = float(adapter.unet.peft_config[adapter.name].lora_alpha)
    wrong = [f"{layer}.alpha" for layer in sorted(layers | alphas.keys()) if alphas.get(layer) != alpha]
    return _differing(state, tensors) + wrong


def _refuse(place: Path, differing: list[str], difference: float, dtype: torch.dtype) -> None:
    if not differing and difference <= TOLERANCES[dtype]:
        return
    what = f"{len(differing)} weights differ: {differing[0]}" if differing else f"outputs differ by {difference:.1e}"
    raise RunError(f"the export in {place} does not load back to the trained model: {what}")


def _compare_pipeline(model: DiffusionModel, folder: Path) -> tuple[list[str], float]:
    with without_library_bars():
        reloaded: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # Not diffusers' own `to`, which warns of a dtype.
    unet: Any = nn.Module.to(reloaded.unet, model.unet.device, model.unet.dtype).eval()
    differing = _differing(model.unet.state_dict(), unet.state_dict())
    trained = _answer(model)
    live, model.unet = model.unet, unet
    try:
        return differing, _distance(trained, _answer(model))
    finally:
        model.unet = live


def _differing(trained: dict[str, Tensor], reloaded: dict[str, Tensor]) -> list[str]:
    names = trained.keys() | reloaded.keys()
    return sorted(
        name
        for name in names
        if name not in trained or name not in reloaded or not torch.equal(trained[name], reloaded[name])
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@torch.no_grad()
def _answer(model: DiffusionModel) -> Tensor:
    """The UNet's output, fp32, on a fixed small input and the empty prompt."""
    unet = model.unet
    size = 2 ** (len(unet.config["block_out_channels"]) - 1)
    x = seeding.normal(torch.tensor([0]), "verify", (unet.config["in_channels"], size, size)).to(unet.device)
    geometry = torch.tensor([[size, size, 0, 0, size, size]])
    cond = model.conditioner.kwargs(model.conditioner.encode([""]), geometry) if model.conditioner.tokenizer else {}
    cond = map_tensors(lambda tensor: tensor.to(unet.device, unet.dtype), cond)
    t = torch.tensor([500], device=unet.device)
    return unet(x.to(unet.dtype), t, **cond).sample.float()

"""Verification of exports: load through diffusers and compare with the model."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import seeding
from finetune.batch import map_tensors
from finetune.errors import RunError
from finetune.models.ldm_file import classic_names
from finetune.models.ldm_keys import unet_keys
from finetune.models.loading import DiffusionModel, without_library_bars
from finetune.models.lora import LORA_FILE, Adapter
from finetune.models.lora_formats import LoraFile
from finetune.models.lora_math import update
from finetune.models.pissa import start_of
from finetune.models.single_file import Checkpoint, inspect
from finetune.models.source import FileSource
from finetune.models.weights import rounded

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest allowed difference of the outputs, relative to the largest output: a few roundings of the UNet's dtype.

The weights themselves are compared to the bit.
"""

_WITH_START = 10.0
"""Times the tolerance for an adapter with a start (PiSSA): its two parts are as large as the weights, not as what was
learned, and so are the roundings of their sum."""


def verify_export(model: DiffusionModel, folder: Path) -> float:
    """Compare the UNet with the export of it in `folder`: every weight, and the output on a fixed input.

    Returns:
        The largest difference of the outputs, relative to the largest output; at most what `TOLERANCES` allows.

    Raises:
        RunError: a weight is missing, unexpected or differs, or the outputs do.
    """
    return verify_peft(model, folder) if Adapter.attached_to(model.unet) else verify_pipeline(model, folder)


def verify_peft(model: DiffusionModel, folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Verify an adapter file of this dtype in peft's layout by loading it as a second adapter on the same base."""
    adapter = _adapter(model)
    expected = adapter.uniform(dtype).tensors if adapter.kind in ("lora", "dora") else adapter.state(dtype)
    differing = _differing(expected, load_file(folder / LORA_FILE))
    return _prove(model, folder, differing, lambda: adapter.replaced_by_file(folder), dtype)


def verify_kohya(model: DiffusionModel, path: Path, dtype: torch.dtype = torch.float32) -> float:
    """Verify an adapter file in kohya's layout.

    Every tensor and alpha is read back by the layout's definition, and compared to the bit. Then diffusers' own
    converter loads the file, and the outputs are compared; for kinds and layers that not every version of it can
    load, what the file adds to each weight by the definition of its kind is compared with what the trained adapter
    adds.
    """
    adapter = _adapter(model)
    differing = differing_from_kohya(adapter, path, adapter.kohya_state(dtype))
    if adapter.kind != "lora" or adapter.layers_outside_blocks():
        difference = float("inf") if differing else _distance_of_updates(adapter, path)
        _refuse(path, differing, difference, dtype)
        return difference
    return _prove(model, path, differing, lambda: adapter.replaced_by_kohya(path), dtype)


def differing_from_kohya(adapter: Adapter, path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """The tensors and alphas that a kohya file has otherwise than this state of the adapter, or not, or beside it."""
    tensors, alphas = adapter.read_kohya(path, next(iter(state.values())).device)
    layers = LoraFile(dict(state), {}, text_tensors=0).layers().keys()
    ours = {layer: torch.tensor(alpha).item() for layer, alpha in adapter.alphas().items()}
    wrong = [f"{layer}.alpha" for layer in sorted(layers | alphas.keys()) if alphas.get(layer) != ours.get(layer)]
    return _differing(state, tensors) + wrong


def _distance_of_updates(adapter: Adapter, path: Path) -> float:
    """The largest difference of any layer's update, relative to the largest update of the adapter or its start."""
    tensors, alphas = adapter.read_kohya(path, adapter.unet.device)
    lora = LoraFile(tensors, alphas, text_tensors=0)
    theirs, ours = lora.layers(), adapter.updates()
    differences = [
        (update(theirs[layer], lora.alphas[layer], ours[layer].shape) - ours[layer]).abs().max() for layer in ours
    ]
    return (torch.stack(differences).max() / adapter.largest_update()).item()


def verify_pipeline(
    model: DiffusionModel, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None
) -> float:
    """Verify a pipeline folder written in this dtype (None: the UNet's own); frozen parts must be equal to the bit."""
    formats = _as_in_file({"unet": dtype or model.unet.dtype, "default": torch.float32})
    with without_library_bars():
        reloaded: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True, variant=variant, **formats)
    components = {
        name: part for name, part in reloaded.components.items() if isinstance(part, nn.Module) and name != "unet"
    }
    if differing := _differing_around(model, components, dtype or torch.float32):
        _refuse(folder, differing, 0.0, dtype or torch.float32)
    return _prove_unet(model, folder, reloaded.unet, dtype)


def verify_unet(model: DiffusionModel, folder: Path, dtype: torch.dtype | None = None) -> float:
    """Verify the folder of a UNet alone."""
    formats = _as_in_file(dtype or model.unet.dtype)
    reloaded = type(model.unet).from_pretrained(folder, local_files_only=True, **formats)
    return _prove_unet(model, folder, reloaded, dtype)


def verify_single_file(model: DiffusionModel, path: Path, dtype: torch.dtype) -> float:
    """Verify a checkpoint in one file: read as any such file is, and its UNet's keys by diffusers' own converter.

    Every weight, rounded to `dtype`, is compared to the bit, a tensor at a time. The output is compared with that of a
    UNet which is built as the file says, with the model's own weights: for a second set there may be no memory.
    """
    checkpoint = inspect(path)
    if checkpoint.prediction_type != model.prediction_type:
        found = f"it is read as one that predicts {checkpoint.prediction_type}, not {model.prediction_type}"
        raise RunError(f"the export in {path} does not load back to the trained model: {found}")
    source = FileSource(checkpoint, None)
    pipeline: Any = model.pipeline()
    differing = _keys_that_diffusers_reads_otherwise(model.unet, checkpoint)
    for part in ("unet", "vae", *(name for name in model.family.components if name.startswith("text_encoder"))):
        module = getattr(pipeline, part)
        state = classic_names(module) if part.startswith("text_encoder") else module.state_dict()
        wrong = _differing_in_file(state, source.weights(part), dtype)
        differing += wrong if part == "unet" else [f"{part}.{name}" for name in wrong]
    if differing:
        _refuse(path, differing, 0.0, dtype)
    rebuilt = source.empty_unet()
    rebuilt.load_state_dict(model.unet.state_dict(), assign=True)
    return _compare_answers(model, path, rebuilt, model.unet.dtype)


def _keys_that_diffusers_reads_otherwise(unet: Any, checkpoint: Checkpoint) -> list[str]:
    """The UNet's weights that diffusers' converter does not find under the file's key for them."""
    file = {name: torch.empty(shape, device="meta") for name, shape in checkpoint.shapes.items()}
    names = {id(tensor): name for name, tensor in file.items()}
    converted = convert_ldm_unet_checkpoint(dict(file), {"class_embed_type": None, **unet.config})
    theirs = {name: names.get(id(tensor)) for name, tensor in converted.items()}
    ours = unet_keys(unet.config, unet.state_dict())
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


def _differing_in_file(
    state: Mapping[str, Tensor], written: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> list[str]:
    """The names that only one has, or whose values are not ours rounded to `dtype`, or not finite."""
    wrong, missing = [], set(state)
    for name, tensor in written:
        missing.discard(name)
        if name not in state or not _is_rounded(tensor, state[name], dtype):
            wrong.append(name)
        del tensor  # before the next one is read
    return sorted([*wrong, *missing])


def _is_rounded(tensor: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is ours rounded to `dtype`, and finite; with no memory but that of ours in this dtype."""
    finite = not tensor.numel() or (tensor.amin().isfinite() & tensor.amax().isfinite()).item()
    return bool(finite) and torch.equal(ours.to(dtype), tensor.to(ours.device))


def _differing_around(model: DiffusionModel, components: Mapping[str, nn.Module], dtype: torch.dtype) -> list[str]:
    """The weights of frozen parts that are not ours rounded to `dtype`."""
    pipeline: Any = model.pipeline()
    wrong: list[str] = []
    for name, part in components.items():
        ours = rounded(rounded(getattr(pipeline, name).state_dict(), dtype))
        wrong += [f"{name}.{key}" for key in _differing(ours, rounded(part.state_dict()))]
    return wrong


def _as_in_file(formats: object) -> dict[str, Any]:
    """What tells diffusers the number formats to load weights in: those of the files, for others take more memory."""
    renamed = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 40)
    return {"dtype" if renamed else "torch_dtype": formats}


def _adapter(model: DiffusionModel) -> Adapter:
    adapter = Adapter.attached_to(model.unet)
    assert adapter is not None
    return adapter


def _prove(
    model: DiffusionModel,
    place: Path,
    differing: list[str],
    replaced: Callable[[], AbstractContextManager[None]],
    dtype: torch.dtype,
) -> float:
    """Compare the outputs with those inside of `replaced`, unless weights differ already."""
    model.unet.eval()
    with _adapter(model).rounded():
        trained = _answer(model)
    difference = float("inf")
    if not differing:
        with replaced():
            difference = _distance(trained, _answer(model))
    precision = dtype if model.unet.dtype == torch.float32 else model.unet.dtype
    _refuse(place, differing, difference, precision, times=_WITH_START if start_of(model.unet) else 1.0)
    return difference


def _prove_unet(model: DiffusionModel, place: Path, reloaded: Any, dtype: torch.dtype | None) -> float:
    """Compare every weight, after rounding to `dtype`, and the output, with those of a UNet that was read back.

    For its output it takes over the weights that they were found equal to, to the bit: for two sets of them there may
    be no room where one was trained.
    """
    dtype = dtype or model.unet.dtype
    live = model.unet.eval()
    expected = rounded(rounded(live.state_dict(), dtype), live.dtype)
    differing = _differing(expected, reloaded.state_dict(), live.dtype)
    if differing:
        _refuse(place, differing, float("inf"), dtype)
    reloaded.load_state_dict(expected, assign=True)
    return _compare_answers(model, place, reloaded, dtype)


def _compare_answers(model: DiffusionModel, place: Path, reloaded: Any, dtype: torch.dtype) -> float:
    """Compare the model's output with that of another UNet in its place, which may share its weights."""
    live = model.unet.eval()
    trained = _answer(model)
    nn.Module.to(reloaded, live.device, live.dtype)  # diffusers' own `to` warns of a dtype
    model.unet = reloaded.eval()
    try:
        difference = _distance(trained, _answer(model))
    finally:
        model.unet = live
    _refuse(place, [], difference, dtype)
    return difference


def _refuse(place: Path, differing: list[str], difference: float, dtype: torch.dtype, *, times: float = 1.0) -> None:
    """Raise RunError unless nothing differs, and outputs by at most `times` what `TOLERANCES` allows."""
    if not differing and difference <= times * TOLERANCES[dtype]:
        return
    what = f"{len(differing)} weights differ: {differing[0]}" if differing else f"outputs differ by {difference:.1e}"
    raise RunError(f"the export in {place} does not load back to the trained model: {what}")


def _differing(
    trained: Mapping[str, Tensor], reloaded: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> list[str]:
    """The names that only one has, or whose values differ, wherever each of the two is.

    `dtype`: what those that were reloaded are converted to before, one by one.
    """
    wrong = trained.keys() ^ reloaded.keys()
    for name in trained.keys() & reloaded.keys():
        if not torch.equal(trained[name], reloaded[name].to(trained[name].device, dtype)):
            wrong.add(name)
    return sorted(wrong)


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@torch.no_grad()
def _answer(model: DiffusionModel) -> Tensor:
    """The UNet's output, fp32, on a fixed small input and the empty prompt."""
    unet = model.unet
    size = 2 ** (len(unet.config["block_out_channels"]) - 1)
    x = seeding.normal(torch.tensor([0]), "verify", (unet.config["in_channels"], size, size)).to(unet.device)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]])
    cond = model.conditioner.kwargs(model.conditioner.encode([""]), time_ids) if model.conditioner.tokenizer else {}
    cond = map_tensors(lambda tensor: tensor.to(unet.device, unet.dtype), cond)
    t = torch.tensor([500], device=unet.device)
    return unet(x.to(unet.dtype), t, **cond).sample.float()

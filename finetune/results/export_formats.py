"""Export formats: LoRA files, a pipeline, a checkpoint in one file, a UNet; each is verified after it is written."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.atomic_io import flush_to_disk, flush_tree, move_over, remove, write_whole
from finetune.errors import ModelError, RunError, UsageError
from finetune.models.ldm_file import checkpoint_tensors, rest_of
from finetune.models.loading import DiffusionModel
from finetune.models.lora import Adapter
from finetune.models.pipeline_folder import write_pipeline
from finetune.models.prediction_marks import marks, set_by_hand, yaml_beside
from finetune.models.single_file import Checkpoint
from finetune.models.tensor_file import DTYPES, stream_tensors
from finetune.models.weights import in_dtype, read_tensors, save_part
from finetune.results.lora_metadata import architecture
from finetune.results.verify import verify_kohya, verify_peft, verify_pipeline, verify_single_file, verify_unet

_log = logging.getLogger(__name__)


def write_format(
    model: DiffusionModel,
    to: Path,
    form: Literal["kohya", "peft", "diffusers", "single-file", "unet"],
    precision: Literal["fp32", "fp16", "bf16"],
    metadata: Mapping[str, str],
    base: Checkpoint | None = None,
    variant: str | None = None,
) -> float:
    """Write the model in one form, load it back and compare.

    Args:
        model: with an adapter, or with trained weights, in fp32. A LoRA is merged into it for all forms but its own.
        to: a file (kohya, single-file) or a folder that is not there yet.
        form: see `finetune.commands.export`.
        precision: number format of what is written.
        metadata: metadata for a LoRA file; a checkpoint in one file takes the resolution from it.
        base: for a checkpoint in one file: where to take from what a diffusers folder has no place for.
        variant: for a diffusers folder, see `write_pipeline`.

    Returns:
        The largest difference of the UNet's outputs, relative to the largest output.

    Raises:
        UsageError: the model has no such form.
        ModelError: `base` is of another kind.
        RunError: what was written does not load back to the same model.
    """
    dtype, adapter = DTYPES[precision], Adapter.attached_to(model.unet)
    if form == "kohya" and adapter:
        adapter.save_kohya(to, metadata, adapter.kohya_state(dtype))
        return verify_kohya(model, to, dtype)
    if form == "peft" and adapter:
        to.mkdir()
        adapter.save(to, model.scheduler_changes, dtype)
        return verify_peft(model, to, dtype)
    if adapter:
        adapter.merge()
    if form == "diffusers":
        to.mkdir()
        write_pipeline(model, to, dtype, variant)
        return verify_pipeline(model, to, dtype, variant)
    if form == "unet":
        save_part(in_dtype(model.unet, dtype), to)
        return verify_unet(model, to, dtype)
    _write_single_file(model, to, dtype, metadata, base)
    return verify_single_file(model, to, dtype)


def _write_single_file(
    model: DiffusionModel, to: Path, dtype: torch.dtype, metadata: Mapping[str, str], base: Checkpoint | None
) -> None:
    """Write a checkpoint in one file, a tensor at a time, and its YAML file where it needs one."""
    family = model.family.layout
    if family is None:
        raise UsageError(f"--format single-file: {model.family.description} has no such form; choose diffusers or unet")
    pipeline = model.pipeline()
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(pipeline, family)}
    rest = [] if base is None else rest_of(base, shapes, family)

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint_tensors(pipeline, family):
            if name not in rest:
                yield name, tensor.to(dtype)
        if base is not None:
            yield from read_tensors(base.path, rest)
        yield from marks(model.scheduler.config, family).items()

    stream_tensors(to, items, _checkpoint_facts(model, family, to.stem, metadata), digests=True)
    if settings := _settings(model, family):
        write_whole(to.with_suffix(".yaml"), settings)


def has_yaml(model: DiffusionModel) -> bool:
    """Whether a checkpoint in one file of this model needs a YAML file beside it."""
    return model.family.layout is not None and _settings(model, model.family.layout) is not None


def _settings(model: DiffusionModel, family: str) -> str | None:
    return yaml_beside(model.scheduler.config, family, image_condition=model.family.image_condition)


def _checkpoint_facts(model: DiffusionModel, family: str, title: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Entries of the Stability AI Model Metadata Standard 1.0.1."""
    prediction_type = model.prediction_type
    pipeline: Any = model.pipeline()
    side = pipeline.vae_scale_factor * model.unet.config["sample_size"]
    return {
        "modelspec.resolution": metadata.get("modelspec.resolution", f"{side}x{side}"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture(family, prediction_type)[1],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
    }


def write_verified(
    model: DiffusionModel,
    to: Path,
    form: Literal["kohya", "peft", "diffusers", "single-file", "unet"],
    precision: Literal["fp32", "fp16", "bf16"],
    metadata: dict[str, str],
    base: Checkpoint | None = None,
    variant: str | None = None,
) -> None:
    """Write the model in one form, prove it, and only then put it where it belongs.

    It is written in a hidden folder of its own, so a crash leaves nothing at `to`. What does not load back to the same
    model is kept as `<name>.rejected`.
    """
    config_file = to.with_suffix(".yaml")
    if form == "single-file" and has_yaml(model) and config_file.exists():
        raise UsageError(f"{config_file} exists already, and is to say what the checkpoint predicts; give another name")
    scratch = to.with_name(f".{to.name}.export.part")
    remove(scratch)
    scratch.mkdir()
    try:
        difference = write_format(model, scratch / to.name, form, precision, metadata, base=base, variant=variant)
    except (RunError, ModelError):
        if (scratch / to.name).exists():
            move_over(scratch / to.name, to.with_name(f"{to.name}.rejected"))
        raise
    else:
        flush_tree(scratch)
        for entry in sorted(scratch.iterdir(), key=lambda path: path.name == to.name):  # what lies beside it first
            move_over(entry, to.with_name(entry.name))
        flush_to_disk(to.parent)
    finally:
        remove(scratch)
    _log.info(f"{to}: loaded back and compared (largest difference {difference:.0e})")
    for line in set_by_hand(to, model.prediction_type) if form == "single-file" else ():
        _log.warning(line)

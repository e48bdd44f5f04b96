"""Writing a pipeline folder: trained parts are saved, frozen parts are copied from the base's files."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.models.clip_tokenizer import write_vocabulary
from finetune.models.ldm_file import classic_names
from finetune.models.loading import DiffusionModel
from finetune.models.tensor_file import write_tensors
from finetune.models.weights import in_dtype, rounded, save_part

_WRITTEN_BY_TRANSFORMERS = {"format": "pt"}
"""Without this entry transformers refuses a file."""


def write_pipeline(model: DiffusionModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a pipeline that `DiffusionPipeline.from_pretrained` loads.

    The files of frozen parts are copied byte for byte, so that they load wherever the base loads. In another `dtype`
    than fp32 their weights are cast, under the names that the base's file gives them. The parts of a checkpoint in
    one file are written again, under names that every version of transformers reads.

    Args:
        model: without an adapter.
        folder: exists, and is empty.
        dtype: of the weights. fp32: the UNet as it is, the others as the base has them.
    """
    pipeline: Any = model.pipeline()
    pipeline.save_config(folder)
    for part in model.family.components:
        module: Any = getattr(pipeline, part)
        place = folder / part
        if part in model.component_dirs:
            _copy(model.component_dirs[part], place, dtype)
        else:
            written = in_dtype(module, dtype) if isinstance(module, nn.Module) else module
            save_part(written, place)
            if part.startswith("text_encoder"):
                write_tensors(place / "model.safetensors", classic_names(written), _WRITTEN_BY_TRANSFORMERS)
        if part.startswith("tokenizer") and not (place / "vocab.json").exists():
            write_vocabulary(module, place)


def _copy(source: Path, place: Path, dtype: torch.dtype) -> None:
    """The files of a part that loading it reads, which leaves out other variants of its weights."""
    place.mkdir()
    weights = [path for path in source.glob("*.safetensors") if not _is_variant(path)]
    others = [path for path in source.iterdir() if path.suffix in (".json", ".txt") and not _is_variant(path)]
    for path in (*others, *weights):
        if path in weights and dtype != torch.float32:
            tensors: dict[str, Tensor] = load_file(path)
            write_tensors(place / path.name, rounded(tensors, dtype), _WRITTEN_BY_TRANSFORMERS)
        else:
            shutil.copyfile(path, place / path.name)


def _is_variant(path: Path) -> bool:
    """`model.fp16.safetensors`, `diffusion_pytorch_model.safetensors.index.fp16.json`, and hidden files."""
    return path.name.startswith(".") or ".fp16" in path.suffixes or ".non_ema" in path.suffixes

"""Writing a pipeline folder: trained parts are saved, frozen parts are copied from the base's files."""

import json
import re
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

_INDEX = ".safetensors.index.json"
"""What the name of a list of shards ends with."""
_WRITTEN_BY_TRANSFORMERS = {"format": "pt"}
"""Without this entry transformers refuses a file."""


def write_pipeline(
    model: DiffusionModel, folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> None:
    """Write a pipeline that `DiffusionPipeline.from_pretrained` loads.

    The files of frozen parts are copied byte for byte, so that they load wherever the base loads. In another `dtype`
    than fp32 their weights are cast, under the names that the base's file gives them. The parts of a checkpoint in
    one file are written again, under names that every version of transformers reads.

    Args:
        model: without an adapter.
        folder: exists, and is empty.
        dtype: of the weights. fp32: the UNet as it is, the others as the base has them.
        variant: for `from_pretrained(folder, variant=...)`: what stands in the names of files of weights.
    """
    pipeline: Any = model.pipeline()
    pipeline.save_config(folder)
    for part in model.family.components:
        module: Any = getattr(pipeline, part)
        place = folder / part
        if part in model.component_dirs:
            _copy(model.component_dirs[part], place, dtype, variant)
        else:
            written = in_dtype(module, dtype) if isinstance(module, nn.Module) else module
            save_part(written, place, variant)
            if part.startswith("text_encoder"):
                file = place / variant_name("model.safetensors", variant)
                write_tensors(file, classic_names(written), _WRITTEN_BY_TRANSFORMERS)
        if part.startswith("tokenizer") and not (place / "vocab.json").exists():
            write_vocabulary(module, place)


def _copy(source: Path, place: Path, dtype: torch.dtype, variant: str | None) -> None:
    """The files of a part that loading it reads, which leaves out other variants of its weights."""
    place.mkdir()
    weights = [path for path in source.glob("*.safetensors") if not _is_variant(path)]
    others = [path for path in source.iterdir() if path.suffix in (".json", ".txt") and not _is_variant(path)]
    for path in (*others, *weights):
        to = place / variant_name(path.name, variant)
        if path in weights and dtype != torch.float32:
            tensors: dict[str, Tensor] = load_file(path)
            write_tensors(to, rounded(tensors, dtype), _WRITTEN_BY_TRANSFORMERS)
        elif path.name.endswith(_INDEX):
            shards = json.loads(path.read_text(encoding="utf-8"))
            shards["weight_map"] = {key: variant_name(name, variant) for key, name in shards["weight_map"].items()}
            to.write_text(json.dumps(shards, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(path, to)


def variant_name(name: str, variant: str | None) -> str:
    """The name of a file with a variant in it, where the file is of weights: as diffusers and transformers look for it.

    "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json".
    """
    if variant is None or ".safetensors" not in name:
        return name
    if name.endswith(_INDEX):
        return f"{name.removesuffix('.json')}.{variant}.json"
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", rf".{variant}\1.safetensors", name)


def _is_variant(path: Path) -> bool:
    """`model.fp16.safetensors`, `diffusion_pytorch_model.safetensors.index.fp16.json`, and hidden files."""
    return path.name.startswith(".") or ".fp16" in path.suffixes or ".non_ema" in path.suffixes

"""Writes every kind of file that this package exports, from small models, and what their UNets answer."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.pipeline_folder import write_pipeline
from finetune.models.tiny import tiny_folder
from finetune.results.export import export, kohya_file
from finetune.results.export_formats import write_format
from tests.small_models import small_pipeline, write_single_file

CASES = "cases.json"
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "SD 1.5": ("sd15", "epsilon", {}),
    "SD 1.5 inpainting": ("sd15", "epsilon", {"in_channels": 9}),
    "SD 2.1 v": ("sd21", "v_prediction", {}),
    "XL": ("sdxl", "epsilon", {}),
    "XL v": ("sdxl", "v_prediction", {}),
}
"""Name -> family, what it predicts, and what is other in its UNet's config."""
ADAPTERS: Mapping[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, alpha is not rank": {"alpha": 1},
    "LoRA with block ranks": {"block_ranks": {"up_blocks.1": 2}},
    "rslora": {"kind": "rslora", "alpha": 3},
    "convolutions": {"conv_rank": 2, "conv_alpha": 1},
    "every layer": {"target_modules": ("full",)},
    "LoHa": {"kind": "loha", "alpha": 2},
    "LoKr": {"kind": "lokr", "alpha": 2},
    "DoRA": {"kind": "dora", "alpha": 2},
}
"""Name -> arguments of `add_lora`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A file, and how a client can tell whether it means the same there."""

    model: str
    what: str
    form: str
    """ "peft", "kohya", "pipeline" or "single-file"."""
    path: str
    base: str
    """The folder of the base model."""
    answers: str
    """A file of the UNet's inputs, its outputs before (`base`) and after training (`trained`)."""
    layers: int
    """How many layers are adapted."""
    prediction_type: str


def write_cases(folder: Path) -> list[Case]:
    """Write the files of all models and adapters, and `cases.json` with what they are."""
    cases: list[Case] = []
    for number, (name, (family, prediction_type, unet)) in enumerate(MODELS.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        checkpoint = write_single_file(
            place / "base.safetensors", family, small_pipeline(family, prediction_type, **unet)
        )
        given = {"tokenizer": str(tiny_folder() / "tokenizer"), "prediction_type": prediction_type}
        (place / "base").mkdir()
        write_pipeline(load_model(checkpoint, **given), place / "base")
        for model, *rest in _trained(lambda: load_model(checkpoint, **given), place):  # noqa: B023 # used at once
            cases += _exported(model, name, *rest, place / "base")
    (folder / CASES).write_text(json.dumps([dataclasses.asdict(case) for case in cases], indent=1))
    return cases


def _trained(load: Any, place: Path) -> Iterator[tuple[DiffusionModel, str, Path]]:
    for number, (what, arguments) in enumerate(ADAPTERS.items()):
        model = load()
        add_lora(model.unet, rank=4, **arguments)
        yield model, what, place / f"dog{number}"
    model = load()
    model.unet.requires_grad_(True)
    yield model, "full fine-tune", place / "dog"


def _exported(model: DiffusionModel, name: str, what: str, folder: Path, base: Path) -> Iterator[Case]:
    inputs = _inputs(model)
    outputs = {"base": _answer(model, inputs)}
    noise = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=noise)
    outputs["trained"] = _answer(model, inputs)
    answers = folder.with_suffix(".answers.safetensors")
    save_file(inputs | outputs, answers)
    export(model, folder)
    layers = sum(isinstance(module, BaseTunerLayer) for module in model.unet.modules())
    shared = (str(base), str(answers), layers, model.prediction_type)
    if layers:
        yield Case(name, what, "peft", str(folder), *shared)
        yield Case(name, what, "kohya", str(kohya_file(folder)), *shared)
        return
    single_file = folder.with_suffix(".safetensors")
    write_format(model, single_file, "single-file", "fp32", {})
    yield Case(name, what, "pipeline", str(folder), *shared)
    yield Case(name, what, "single-file", str(single_file), *shared)


def _inputs(model: DiffusionModel) -> dict[str, Tensor]:
    config, noise = model.unet.config, torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (1, config["in_channels"], 16, 16),
        "encoder_hidden_states": (1, 77, config["cross_attention_dim"]),
    }
    if model.family.layout == "sdxl":
        ids = 6 * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (1, config["projection_class_embeddings_input_dim"] - ids), "time_ids": (1, 6)}
    return {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}


@torch.no_grad()
def _answer(model: DiffusionModel, inputs: Mapping[str, Tensor]) -> Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    unet: Any = model.unet.eval()
    return unet(inputs["sample"], 500, inputs["encoder_hidden_states"], added_cond_kwargs=added).sample


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]))

"""Reads our files with the diffusers that it is run with, and prints a JSON line for each; imports nothing of ours.

PYTHONPATH=FOLDER/0.30.3 python tests/clients/reader.py CASES_JSON
"""

import json
import logging
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file


def read(case: dict) -> dict:
    """How far the UNet's output is from ours, relative to what training changed, and how many layers were adapted."""
    pipeline = load(case)
    tensors = load_file(case["answers"])
    added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}
    with torch.no_grad():
        output = pipeline.unet.eval()(
            tensors["sample"], 500, tensors["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
    error, change = output - tensors["trained"], tensors["trained"] - tensors["base"]
    return {
        "difference": (error.abs().max() / change.abs().max()).item(),
        "layers": sum(isinstance(module, BaseTunerLayer) for module in pipeline.unet.modules()),
        "prediction_type": pipeline.scheduler.config.get("prediction_type", "flow"),
    }


def load(case: dict):  # a class of whichever diffusers this is
    """The pipeline with what the case's file holds."""
    path = Path(case["path"])
    if case["form"] == "single-file":
        kind = DiffusionPipeline.load_config(case["base"])["_class_name"]
        diffusers = __import__("diffusers")
        return getattr(diffusers, kind).from_single_file(str(path), config=case["base"], local_files_only=True)
    if case["form"] == "pipeline":
        return DiffusionPipeline.from_pretrained(str(path), local_files_only=True)
    pipeline = DiffusionPipeline.from_pretrained(case["base"], local_files_only=True)
    if case["form"] == "peft":
        pipeline.load_lora_weights(str(path))
    else:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipeline


def main() -> None:
    """Read every case."""
    logging.disable(logging.WARNING)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = read(case)
        except Exception as error:  # noqa: BLE001 # what a client makes of a file is what is to be found out
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

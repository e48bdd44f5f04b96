"""Inpainting models for tests: a model folder whose UNet takes a mask and what is left of a picture beside x_t."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def make_inpainting(model: Path, folder: Path) -> Path:
    """Copy a model folder of 4 latent channels, its UNet widened to 9; the new weights are random."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    first = weights["conv_in.weight"]
    more = torch.randn(first.shape[0], 5, *first.shape[2:], generator=torch.Generator().manual_seed(0))
    weights["conv_in.weight"] = torch.cat([first, 0.1 * more.to(first.dtype)], dim=1)
    save_file(weights, path, {"format": "pt"})
    index = folder / "model_index.json"
    known = json.loads(index.read_text())
    known["_class_name"] = known["_class_name"].replace("Pipeline", "InpaintPipeline")
    index.write_text(json.dumps(known))
    return folder

"""What Forge's own code for LoRA files, which is ComfyUI's, makes of our kohya files.

    python -m tests.clients.forge CHECKOUT    # of lllyasviel/stable-diffusion-webui-forge

Forge itself is not installed: of its memory management its LoRA code needs one function, which is given here. For each
file it prints how many layers are found, and how far the merged weights are from those of training.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from finetune.models.ldm_keys import UNET, unet_keys
from finetune.models.loading import load_model
from finetune.models.lora import Adapter, load_lora
from tests.clients.files import Case, write_cases

_STABLE_DIFFUSION = {
    "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
}  # fmt: skip
_XL = {
    "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3], "transformer_depth_middle": 3,
}  # fmt: skip
"""Forge's configs for the UNets of `tests/small_models.py`."""


def forge_code(checkout: Path) -> Any:
    """Forge's module that finds a LoRA's layers and merges them."""
    memory, operations, utils = (ModuleType(f"backend.{name}") for name in ("memory_management", "operations", "utils"))
    vars(memory)["cast_to_device"] = lambda tensor, device, dtype: tensor.to(device, dtype)
    backend = ModuleType("backend")
    backend.__path__ = [str(checkout / "backend")]
    vars(backend).update(memory_management=memory, operations=operations, utils=utils)
    sys.modules |= {module.__name__: module for module in (backend, memory, operations, utils)}
    sys.path.insert(0, str(checkout))
    return importlib.import_module("backend.patcher.lora")


def compared(forge: Any, case: Case, peft: Path) -> tuple[int, int, float]:
    """Layers that Forge finds in a kohya file, tensors that it does not use, and the largest difference of a weight."""
    base, trained = load_model(case.base).unet, load_model(case.base).unet
    load_lora(trained, peft)
    Adapter(trained, next(iter(trained.peft_config))).merge()
    keys = {ours: theirs.removeprefix(UNET) for ours, theirs in unet_keys(base.config, base.state_dict()).items()}
    weights: dict[str, Tensor] = {f"diffusion_model.{keys[name]}": tensor for name, tensor in base.state_dict().items()}
    model = SimpleNamespace(
        state_dict=lambda: weights,
        diffusion_model=SimpleNamespace(config=_XL if case.model.startswith("XL") else _STABLE_DIFFUSION),
        config=SimpleNamespace(huggingface_repo=""),
    )
    patches, unused = forge.load_lora(load_file(case.path), forge.model_lora_keys_unet(model, {}))
    worst = 0.0
    for name, expected in trained.state_dict().items():
        key = f"diffusion_model.{keys[name]}"
        merged = weights[key].clone()
        if key in patches:
            merged = forge.merge_lora_to_weight([(1.0, patches[key], 1.0, None, None)], merged, key)
        worst = max(worst, (merged - expected).abs().max().item())
    return len(patches), len(unused), worst


def main() -> None:
    """Print a row for each kohya file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    forge = forge_code(parser.parse_args().checkout)
    with tempfile.TemporaryDirectory() as scratch:
        cases = write_cases(Path(scratch))
        peft = {(case.model, case.what): Path(case.path) for case in cases if case.form == "peft"}
        for case in cases:
            if case.form == "kohya":
                layers, unused, worst = compared(forge, case, peft[case.model, case.what])
                found = f"{layers} of {case.layers} layers, {unused} tensors unused"
                print(f"{case.model}, {case.what}: {found}, weights within {worst:.0e}")


if __name__ == "__main__":
    main()

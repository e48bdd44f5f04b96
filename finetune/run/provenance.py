"""Provenance: what a checkpoint records of the run that wrote it, and how a resume treats differences."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from finetune.config import own_version
from finetune.errors import UsageError
from finetune.models.environment import device_name
from finetune.models.loading import DiffusionModel
from finetune.models.weights import sampled_digest

_FROZEN = {
    "vae": ("vae", "vae_scale", "vae_shift", "vae_reflection_padding"),
    "text_encoder": ("tokenizer", "clip_skip", "max_token_length", "weighted_captions"),
}
"""Frozen part -> options that change its fingerprint."""
_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def run_provenance(model: DiffusionModel, data: str, device: torch.device, processes: int) -> dict[str, Any]:
    """What this run is made of, fit for JSON.

    Args:
        model: untrained, as it was loaded.
        data: digest of the pictures, their names and captions.
        device: on which it learns.
        processes: that train together.
    """
    return {
        "data": data,
        **model_provenance(model),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "version": own_version(),
        "machine": {"device": device_name(device)} | {library: version(library) for library in _LIBRARIES},
    }


def model_provenance(model: DiffusionModel, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What an untrained model is made of, with the base weights of its UNet rounded to `dtype`, fit for JSON."""
    unet: nn.Module = model.unet
    weights = dict(unet.named_parameters())
    frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}  # what a LoRA is put on
    return {
        "base_model": {
            "dtype": str(dtype or next(unet.parameters()).dtype),
            "digest": sampled_digest(frozen or weights, dtype),
        },
        "frozen": {"vae": model.encoder.fingerprint, "text_encoder": model.conditioner.fingerprint},
    }


def check_model(then: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Compare the `model_provenance` of a checkpoint with that of a model.

    Raises:
        UsageError: the base model or a frozen part of it is another.
    """
    base, ours = then.get("base_model", now["base_model"]), now["base_model"]
    if base != ours and base["dtype"] == ours["dtype"] and "model" not in allowed:
        raise UsageError("model: its weights differ from those that the checkpoint started from; --allow_changed model")
    frozen = then.get("frozen", now["frozen"])
    for part, options in _FROZEN.items():
        if frozen[part] != now["frozen"][part] and not {"model", *options} & set(allowed):
            raise UsageError(
                f"{part}: its weights differ from those that the checkpoint started from; --allow_changed model"
            )


def recorded_dtype(provenance: Mapping[str, Any]) -> torch.dtype:
    """The number format of the base weights that a checkpoint started from; fp32 where an older version wrote it."""
    name = provenance.get("base_model", {}).get("dtype", "torch.float32")
    return getattr(torch, name.removeprefix("torch."))


def check_provenance(then: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str]) -> str:
    """What has changed on the way from one `run_provenance` to the other that gives other bits; "" for nothing.

    Args:
        then: of a checkpoint; {} where there is none, or an older version wrote it.
        now: of this run.
        allowed: options that may be others, "data" and "model" among them.

    Raises:
        UsageError: the base model, a frozen part of it or the pictures are others.
    """
    check_model(then, now, allowed)
    if then.get("data", now["data"]) != now["data"] and "data" not in allowed:
        raise UsageError("data: the images differ from those that the checkpoint was trained on; --allow_changed data")
    machine = then.get("machine", now["machine"])
    pairs = {name: (machine.get(name, "unknown"), value) for name, value in now["machine"].items()}
    pairs["processes"] = then.get("processes", now["processes"]), now["processes"]
    return "; ".join(f"{name}: {before} -> {here}" for name, (before, here) in pairs.items() if before != here)


def recorded_threads(provenance: Mapping[str, Any], device: torch.device, processes: int) -> int | None:
    """How many threads computed when a checkpoint was written, where going on with as many gives the same bits."""
    same = device.type == "cpu" and provenance.get("processes") == processes
    return provenance["threads"] if same else None


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set the number of CPU threads for a while (None: unchanged); sums depend on how many parts they are split in."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Supported schedulers, VAEs and text encoders, by their JSON files alone. Free of torch and diffusers.

What is trained here is noise prediction on a discrete variance-preserving schedule (Ho et al. 2020, eq. 4) and
rectified flow with a fixed shift. EDM preconditioning scales otherwise: a model of its kind would learn without an
error, and be ruined.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ModelError

SCHEDULERS = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""The schedulers of diffusers whose betas describe the noise of Stable Diffusion 1, 2, XL and DDPM."""

FLOW = "FlowMatchEulerDiscreteScheduler"
"""The scheduler of diffusers for rectified flow."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def refuse_unknown_parts(name: str, folder: Path) -> None:
    """Raise ModelError for a part whose config asks for what is not trained here; missing files are not complained of.

    Args:
        name: of the model, for the message.
        folder: in diffusers layout.
    """
    checks = {
        "scheduler/scheduler_config.json": _of_scheduler,
        "vae/config.json": _of_vae,
        "text_encoder/config.json": _of_text_encoder,
        "text_encoder_2/config.json": _of_text_encoder,
    }
    for file, problems in checks.items():
        if (folder / file).is_file():
            for problem in problems(_read(folder / file)):
                raise ModelError(f"--model {name}: {file}: {problem}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a table of settings")
    return config


def _of_scheduler(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("_class_name")
    if kind == FLOW:
        for name in ("use_dynamic_shifting", "invert_sigmas"):
            if config.get(name):
                yield f"{name} is true: flow matching is trained here with a fixed shift only"
        return
    if kind not in SCHEDULERS:
        supported = ", ".join(name.removesuffix("Scheduler") for name in (*SCHEDULERS, FLOW))
        yield f"{kind} may be another noise process than is trained here; known schedulers are {supported}"
    prediction = config.get("prediction_type", "epsilon")
    flow = bool(config.get("use_flow_sigmas"))
    if flow != (prediction == "flow_prediction"):
        yield f"use_flow_sigmas is {str(flow).lower()} and prediction_type is {prediction}, which do not go together"
    elif not flow and prediction not in PREDICTIONS:
        yield f"prediction_type is {prediction}; choose a model with one of {', '.join(PREDICTIONS)}"


def _of_vae(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        yield f"{kind} is not known; choose a model with an AutoencoderKL"
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            yield f"{name} is set: latents that are normalized by channel are not trained here, only scaling_factor"


def _of_text_encoder(config: Mapping[str, Any]) -> Iterator[str]:
    kind = config.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        yield f"{kind} is not known; choose a model with CLIP text encoders"

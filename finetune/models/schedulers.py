"""The schedulers of a model: the one that noise is added by in training, and the sampler that its pipeline draws with.

Which schedulers are known at all is decided in `known_parts.py`, from a folder's files alone.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from finetune.errors import ModelError, UsageError

TrainingScheduler = DDPMScheduler | FlowMatchEulerDiscreteScheduler


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config describes flow matching."""
    return config.get("_class_name") == "FlowMatchEulerDiscreteScheduler" or bool(config.get("use_flow_sigmas"))


def flow_config(config: Mapping[str, Any], shift: float | None = None) -> dict[str, Any]:
    """The config of a FlowMatchEulerDiscreteScheduler with the schedule of another one.

    Args:
        config: of any scheduler.
        shift: of the schedule; None: that of the config, or 1.
    """
    there = config.get("shift", config.get("flow_shift", 1.0)) if is_flow(config) else 1.0
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "shift": there if shift is None else shift,
    }


def scheduler_changes(
    config: Mapping[str, Any], *, prediction_type: str | None, zero_terminal_snr: bool | None
) -> dict[str, Any]:
    """What the options change in the config of a scheduler that is none of flow matching.

    Args:
        config: of the folder's scheduler.
        prediction_type: "epsilon", "v_prediction" or "sample"; "flow" keeps what it is, see `Diff2Flow`; None too.
        zero_terminal_snr: rescale the schedule so that its last timestep is pure noise (Lin et al. 2023, "Common
            Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1), and begin to draw there; False: do
            not; None: as the config says.
    """
    changes: dict[str, Any] = {}
    if prediction_type not in (None, "flow"):
        changes["prediction_type"] = prediction_type
    if zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = zero_terminal_snr
    if zero_terminal_snr:
        changes["timestep_spacing"] = "trailing"
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return {name: value for name, value in changes.items() if config.get(name, defaults.get(name)) != value}


def refuse_for_flow(prediction_type: str | None, zero_terminal_snr: bool | None) -> None:
    """Raise UsageError for options that a flow model cannot have."""
    if prediction_type not in (None, "flow"):
        raise UsageError(f"prediction_type = {prediction_type}: the model's scheduler is one of flow matching")
    if zero_terminal_snr is not None:
        raise UsageError("zero_terminal_snr cannot be used with flow matching, which ends at pure noise anyway")


def make_sampler(place: Path, config: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """The sampler of a latent pipeline, from a scheduler's config and what is changed in it.

    Only schedulers that diffusers itself ships are made; nothing else is imported. Where the folder's own has no form
    of what is changed, or cannot be used by the pipelines of Stable Diffusion, another one takes its place.

    Raises:
        ModelError: there is no such scheduler.
    """
    name = config.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ModelError(f"{place}: scheduler: {config.get('_class_name')!r} is not a scheduler of diffusers")
    if kind is FlowMatchEulerDiscreteScheduler:  # it has no `init_noise_sigma`, which those pipelines read
        return UniPCMultistepScheduler(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.get("shift", 1.0),
            steps_offset=1,  # it does nothing here, but Stable Diffusion's pipeline wants it
        )
    takes: Any = kind.__init__
    if changes.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(takes).parameters:
        kind = DDIMScheduler
    return kind.from_config(dict(config), **changes)  # pyright: ignore[reportAttributeAccessIssue] # of ConfigMixin

"""build_objective: the objective of a run, from its config and what its model predicts."""

from typing import Any

from diffusers import DDPMScheduler

from finetune.config import ResolvedConfig
from finetune.errors import UsageError
from finetune.models.loading import DiffusionModel
from finetune.training.diff2flow import Diff2Flow
from finetune.training.flow_matching import FlowMatching
from finetune.training.loss_function import LossFunction
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.noise_sampler import NoiseSampler
from finetune.training.objective import DiffusionObjective
from finetune.training.timestep_sampler import TimestepSampler

_OF_NOISE_PREDICTION = ("snr_gamma", "debiased_estimation", "scale_v_pred_loss_like_noise_pred")


def build_objective(config: ResolvedConfig, model: DiffusionModel) -> DiffusionObjective:
    """The objective of a run: of flow matching for a flow model or `prediction_type = flow`, else noise prediction.

    Raises:
        UsageError: an option that the objective does not have, or timesteps that the model does not have.
    """
    timesteps = model.scheduler.config["num_train_timesteps"]
    samplers: dict[str, Any] = {
        "noise_sampler": NoiseSampler(
            offset=config.noise_offset,
            multires_iterations=config.multires_noise_iterations,
            multires_discount=config.multires_noise_discount,
            input_perturbation=config.input_perturbation,
        ),
        "timestep_sampler": TimestepSampler(
            config.timestep_sampling,
            min_timestep=config.min_timestep,
            max_timestep=timesteps if config.max_timestep is None else config.max_timestep,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            beta_alpha=config.beta_alpha,
            beta_beta=config.beta_beta,
        ),
    }
    loss = LossFunction(config.loss_type, huber_c=config.huber_c, huber_schedule=config.huber_schedule)
    scheduler = model.scheduler
    if not isinstance(scheduler, DDPMScheduler):
        _refuse(config, "flow matching", _OF_NOISE_PREDICTION)
        return FlowMatching(timesteps, shift=scheduler.config["shift"], loss_function=loss, **samplers)
    if config.prediction_type == "flow":
        _refuse(config, "Diff2Flow, which has its own weights", (*_OF_NOISE_PREDICTION, "loss_type"))
        shift = 1.0 if config.flow_shift is None else config.flow_shift
        return Diff2Flow(scheduler, shift=shift, **samplers)
    _refuse(config, "noise prediction", ("flow_shift",))
    return NoisePrediction(
        scheduler,
        snr_gamma=config.snr_gamma,
        debiased_estimation=config.debiased_estimation,
        scale_v_pred_loss_like_noise_pred=config.scale_v_pred_loss_like_noise_pred,
        loss_function=loss,
        **samplers,
    )


def _refuse(config: ResolvedConfig, objective: str, names: tuple[str, ...]) -> None:
    """Raise UsageError for the first of these options that is on."""
    off = {"loss_type": "l2"}
    for name in names:
        value = getattr(config, name)
        if value not in (None, False, off.get(name)):
            raise UsageError(f"{name} = {value} cannot be used with {objective}")

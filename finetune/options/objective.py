"""The objective of a run: noise, timesteps and loss."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, option


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective: noise, timesteps and loss."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = option(
        None, suggest_for=("v_parameterization",)
    )
    """What the UNet predicts. Default: as in the model's scheduler config. flow: train with the loss of flow matching;
    a model that predicts noise or v keeps doing so (Diff2Flow)."""
    zero_terminal_snr: bool | None = option(None, aliases=("rescale_betas_zero_snr",))
    """Rescale the noise schedule so that it ends at pure noise, for very dark and bright images (Lin et al. 2023).
    Needs v_prediction. Default: as in the model's scheduler config."""
    flow_shift: float | None = option(None, POSITIVE, suggest_for=("discrete_flow_shift", "shift"))
    """Shift of the timesteps of flow matching; above 1: more noise. Default: as in the model's scheduler config, or
    1."""
    timestep_sampling: Literal["uniform", "logit_normal", "sigmoid", "beta"] = option(
        "uniform", suggest_for=("weighting_scheme", "timestep_distribution")
    )
    """Distribution of the timesteps. logit_normal and beta prefer the middle of the schedule; sigmoid: logit_normal
    with a mean of 0."""
    logit_mean: float = option(0.0, requires="timestep_sampling logit_normal")
    """Mean of the normal variable; above 0: more noise."""
    logit_std: float = option(
        1.0, POSITIVE, requires="timestep_sampling logit_normal or sigmoid", suggest_for=("sigmoid_scale",)
    )
    """Standard deviation of the normal variable."""
    beta_alpha: float = option(
        2.0, POSITIVE, requires="timestep_sampling beta", suggest_for=("flow_beta_schedule_alpha",)
    )
    """First parameter of the beta distribution; larger: more noise."""
    beta_beta: float = option(
        2.0, POSITIVE, requires="timestep_sampling beta", suggest_for=("flow_beta_schedule_beta",)
    )
    """Second parameter of the beta distribution; larger: less noise."""
    min_timestep: int = option(0, NOT_NEGATIVE)
    """Lowest timestep that is trained."""
    max_timestep: int | None = option(None, AT_LEAST_ONE)
    """End of the timesteps that are trained, not included. Default: all, 1000 as a rule."""
    snr_gamma: float | None = option(None, POSITIVE, suggest_for=("min_snr_gamma",))
    """Gamma of Min-SNR loss weighting (Hang et al. 2023); 5.0 is usual. Default: off."""
    debiased_estimation: bool = option(False, aliases=("debiased_estimation_loss",))
    """Weight the loss by 1 / sqrt(SNR) (Yu et al. 2023)."""
    scale_v_pred_loss_like_noise_pred: bool = False
    """Weight the loss of v_prediction as noise prediction would."""
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = option("l2", aliases=("loss",), suggest_for=("loss_fn",))
    """Loss of the error at each place. l2: its square. huber, smooth_l1: large errors count less."""
    huber_schedule: Literal["snr", "exponential", "constant"] = option("snr", requires="loss_type huber or smooth_l1")
    """How the threshold of huber and smooth_l1 falls towards noise."""
    huber_c: float = option(0.1, POSITIVE, requires="loss_type huber or smooth_l1")
    """Threshold of huber and smooth_l1 at the noisy end."""
    noise_offset: float = option(0.0, NOT_NEGATIVE)
    """Strength of a per-channel constant added to the noise; 0.05 to 0.1 helps with very dark and bright images."""
    noise_offset_random_strength: bool = option(False, requires="noise_offset")
    """Draw the strength of `noise_offset` for each visit, from 0 to it."""
    multires_noise_iterations: int = option(0, NOT_NEGATIVE)
    """Number of coarser noises that are added to the noise (pyramid noise); 6 to 10 is usual."""
    multires_noise_discount: float = option(0.3, BELOW_ONE, requires="multires_noise_iterations")
    """Factor by which each coarser noise is weaker than the one before it."""
    input_perturbation: float = option(0.0, NOT_NEGATIVE, aliases=("ip_noise_gamma",))
    """Strength of extra noise in the UNet's input (Ning et al. 2023); 0.1 is usual."""
    input_perturbation_random_strength: bool = option(
        False, requires="input_perturbation", aliases=("ip_noise_gamma_random_strength",)
    )
    """Draw the strength of `input_perturbation` for each visit, from 0 to it."""

"""Building the parts of a run from its config: the model, the encoded images, the trainer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.config import ResolvedConfig, numbers_by_block
from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.image_dataset import ImageDataset
from finetune.data.sampler import Sampler
from finetune.errors import UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import Adapter, add_lora
from finetune.models.lora_layers import train_only
from finetune.models.model_info import ModelInfo
from finetune.models.pissa import start_of
from finetune.optimizer_table import TUNED
from finetune.run.resolve_config import frozen_options
from finetune.seeding import example_key
from finetune.text import pluralize
from finetune.training.backend import DTYPES, compile_blocks
from finetune.training.diff2flow import Diff2Flow
from finetune.training.distributed import Parallel
from finetune.training.ema import Ema
from finetune.training.flow_matching import FlowMatching
from finetune.training.gradient_checkpointing import recompute
from finetune.training.learning_rate import learning_rate
from finetune.training.loss_function import LossFunction
from finetune.training.max_norm import LoraPair, MaxNorm
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.noise_sampler import NoiseSampler
from finetune.training.objective import DiffusionObjective
from finetune.training.optimizer_state import switch_mode
from finetune.training.optimizers import make_optimizer, parameter_groups, parse_arguments
from finetune.training.prior_prediction import Prior, untrained
from finetune.training.timestep_sampler import TimestepSampler
from finetune.training.trainer import Trainer

_log = logging.getLogger(__name__)


def load_base(config: ResolvedConfig, model_info: ModelInfo, dtype: torch.dtype) -> DiffusionModel:
    """The base model as the run's config says, with an untrained adapter for a LoRA; `dtype` is its UNet's."""
    model = load_model(
        model_info,
        resolution=config.resolution,
        dtype=dtype,
        prediction_type=config.prediction_type,
        zero_terminal_snr=config.zero_terminal_snr,
        flow_shift=config.flow_shift,
        **frozen_options(config),
        seed=config.seed,
    )
    if config.method == "lora":
        adapt(config, model.unet)
    elif config.train_modules is not None:
        train_only(model.unet, config.train_modules)
    return model


def adapt(config: ResolvedConfig, unet: UNet2DConditionModel | UNet2DModel) -> None:
    """Add the untrained adapter of a LoRA run to a UNet."""
    add_lora(
        unet,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        seed=config.seed,
        kind=config.lora_type,
        block_ranks=numbers_by_block("block_rank", config.block_rank or (), dict(unet.named_parameters())),
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        lokr_factor=config.lokr_factor,
        init=config.init_lora_weights,
    )


_FIRST_STEP_BY = 60.0
"""Seconds that encoding may take before the first step; what would take longer is encoded as visits come to it."""


def assembled(
    config: ResolvedConfig,
    model_info: ModelInfo,
    pictures: ImageDataset,
    device: torch.device,
    *,
    steps: range,
    validated: Sequence[int] = (),
    parallel: Parallel = Parallel(),  # noqa: B008 # frozen
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[DiffusionModel, EncodedDataset, Trainer[DiffusionObjective]]:
    """The untrained model, what `steps` (from 0) and validations need of the pictures, encoded, and the trainer.

    `on_progress` is called with what is encoded, how many are, and of how many.
    """
    model = _load(config, model_info, device)
    encoded = encoded_for(
        config,
        model,
        pictures,
        steps=steps,
        validated=validated,
        parallel=parallel,
        time_budget=_FIRST_STEP_BY,
        on_progress=on_progress,
    )
    trainer = _trainer(config, model, parallel)
    parallel.broadcast([*trainer.parameters.values(), *trainer.fixed.values()])
    return model, encoded, trainer


def encoded_for(
    config: ResolvedConfig,
    model: DiffusionModel,
    pictures: ImageDataset,
    steps: range,
    validated: Sequence[int],
    parallel: Parallel,
    *,
    time_budget: float,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EncodedDataset:
    """The pictures, with what these steps (from 0) need of them encoded, and all of those that are `validated`; so much
    of it now as takes `time_budget` seconds, unless an option says otherwise.
    """
    return encode(
        pictures,
        model,
        live=config.live_encoding,
        captioning=captioning_of(config),
        seed=config.seed,
        cache_dir=config.cache_dir,
        precision=config.cache_precision,
        any_environment=config.cache_any_environment,
        mask_options={
            "unmasked_weight": config.unmasked_weight,
            "unmasked_probability": config.unmasked_probability,
            "normalize": config.normalize_masked_area_loss,
        },
        visited=chain(
            ((index, None) for index in validated),
            _visits(config, pictures, steps, parallel, keyed=model.image_condition is not None),
        ),
        time_budget={"before": None, "ahead": 0, "auto": time_budget}[config.encode],
        on_progress=on_progress,
    )


def captioning_of(config: ResolvedConfig) -> CaptionAugmentation:
    """How the options of a run make the caption of a visit."""
    return CaptionAugmentation(
        dropout=config.caption_dropout,
        dropout_every_n_epochs=config.caption_dropout_every_n_epochs,
        shuffle=config.shuffle_caption,
        keep_tokens=config.keep_tokens,
        trigger=config.trigger,
        tag_dropout=config.caption_tag_dropout,
        tag_dropout_mode=config.caption_tag_dropout_mode,
        warmup_steps=0 if config.token_warmup_step is None else int(config.token_warmup_step),
        warmup_min=config.token_warmup_min,
        wildcards=config.enable_wildcard,
        prefix=config.caption_prefix or "",
        suffix=config.caption_suffix or "",
        separator=config.caption_separator,
        keep_tokens_separator=config.keep_tokens_separator or "",
        secondary_separator=config.secondary_separator or "",
    )


def _visits(
    config: ResolvedConfig, pictures: ImageDataset, steps: range, parallel: Parallel, *, keyed: bool
) -> Iterator[tuple[int, int | None]]:
    """Yield the pictures that are visited; if `keyed`, with the sample key, which decides what is encoded of them."""
    plan, local = sampler(config, pictures), (steps, parallel.rank, parallel.world_size)
    if keyed:
        for index, number in plan.all_visits(*local):
            yield index, example_key(config.seed, pictures.ids[index], number)
    else:
        yield from ((index, None) for index in plan.visited(*local))


def sampler(config: ResolvedConfig, pictures: ImageDataset) -> Sampler:
    """What each step of a run visits."""
    return Sampler(
        pictures.shapes(),
        batch_size=config.global_batch,
        seed=config.seed,
        repeats=pictures.repeats,
        turns=pictures.turns,
    )


def _load(config: ResolvedConfig, model_info: ModelInfo, device: torch.device) -> DiffusionModel:
    """The model on its device, with an adapter for LoRA: what is frozen in half precision, what has masters in fp32."""
    half = DTYPES[config.mixed_precision] if config.method == "lora" or config.full_bf16 else None
    model = load_base(config, model_info, half or torch.float32).to(device)
    if config.prior_prediction and (new := model.new_prediction_type) is not None:  # before anything is encoded
        raise UsageError(f"prior_prediction: the model does not predict {new} yet; leave prediction_type out")
    recompute(model.unet, config.gradient_checkpointing)
    if config.compile and (why_not := compile_blocks(model.unet)):
        _log.warning("the UNet is not compiled: %s", why_not)
    if config.init_lora and (left := Adapter(model.unet).init_from(Path(config.init_lora))):
        tensors = pluralize(left, "tensor")
        _log.warning("%s: %s for text encoders, which stay as they are", config.init_lora, tensors)
    return model


def _trainer(config: ResolvedConfig, model: DiffusionModel, parallel: Parallel) -> Trainer[DiffusionObjective]:
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    masters, tuned = not config.full_bf16, config.optimizer in TUNED
    rates = numbers_by_block("block_learning_rate", config.block_learning_rate or (), learned)
    optimizer = make_optimizer(
        config.optimizer,
        parameter_groups(learned, rates, config.loraplus_lr_ratio),
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay if tuned or "adam_weight_decay" in config.given else None,
        epsilon=config.adam_epsilon,
        foreach=not (config.method == "full" and masters),  # few weights, or a piece of them at a time
        arguments=parse_arguments(config.optimizer_args),
    )
    if config.use_ema and switch_mode(optimizer, "train"):
        raise UsageError(f"use_ema cannot be used with optimizer {config.optimizer}, which averages the weights itself")
    ema = (
        Ema(learned, inv_gamma=config.ema_inv_gamma, power=config.ema_power, max_decay=config.ema_max_decay)
        if config.use_ema
        else None
    )
    return Trainer(
        model.unet,
        model.encoder,
        build_objective(config, model),
        optimizer,
        learning_rate=_schedule(config),
        micro_batch_size=config.train_batch_size,
        max_grad_norm=config.max_grad_norm,
        precision=None if config.init_lora_weights == "pissa" else DTYPES[config.mixed_precision],
        masters=masters,
        in_backward=bool(config.fused_backward_pass),
        max_bad_steps=config.max_bad_steps,
        ema=ema,
        seed=config.seed,
        parallel=parallel,
        cuda_graphs=config.cuda_graphs,
        prior=_prior(config, model),
        constrain=_max_norm(config, model),
        fixed=start_of(model.unet),
    )


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
            offset_random_strength=config.noise_offset_random_strength,
            multires_iterations=config.multires_noise_iterations,
            multires_discount=config.multires_noise_discount,
            input_perturbation=config.input_perturbation,
            input_perturbation_random_strength=config.input_perturbation_random_strength,
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


def _schedule(config: ResolvedConfig) -> Callable[[int], float]:
    """Step -> learning rate. Raises RunError where a function by import path returns none for a step of the run."""
    schedule = partial(
        learning_rate,
        peak=config.learning_rate,
        schedule=config.lr_scheduler,
        warmup=config.lr_warmup_steps,
        total=config.max_train_steps,
        end=config.lr_end,
        cycles=config.lr_num_cycles,
        power=config.lr_power,
        decay_steps=None if config.lr_decay_steps is None else int(config.lr_decay_steps),
    )
    if ":" in config.lr_scheduler:  # now, not hours later
        for step in range(config.max_train_steps):
            schedule(step)
    return schedule


def _max_norm(config: ResolvedConfig, model: DiffusionModel) -> MaxNorm | None:
    if config.scale_weight_norms is None:
        return None
    adapter = Adapter(model.unet)
    names = {layer: [f"{layer}.lora_{matrix}.{adapter.name}.weight" for matrix in "AB"] for layer in adapter.alphas()}
    pairs = [LoraPair(down, up, scale) for (down, up), scale in zip(names.values(), adapter.scales(), strict=True)]
    return MaxNorm(pairs, config.scale_weight_norms)


def _prior(config: ResolvedConfig, model: DiffusionModel) -> Prior | None:
    if not config.prior_prediction:
        return None
    return untrained(model.unet, DTYPES[config.mixed_precision], adapter=config.method == "lora")

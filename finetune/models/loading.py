"""load_model: from a name or folder to a DiffusionModel with everything frozen but the UNet."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from finetune.errors import ModelError, UsageError
from finetune.models.conditioners import ClipConditioner, Conditioner, NoCondition, SdxlConditioner
from finetune.models.encoders import Encoder, PixelEncoder, VaeEncoder
from finetune.models.families import Family
from finetune.models.image_condition import ImageCondition, image_condition_of
from finetune.models.inpainting import Inpainting
from finetune.models.model_info import ModelInfo, locate, scratch_multiple
from finetune.models.schedulers import (
    TrainingScheduler,
    flow_config,
    is_flow,
    make_sampler,
    refuse_for_flow,
    scheduler_changes,
)
from finetune.models.source import ModelSource, open_source, vae_from, vae_from_file
from finetune.models.vae_scale import rescale, set_padding


@dataclass
class DiffusionModel:
    """A UNet that learns, and the frozen parts around it."""

    unet: UNet2DConditionModel | UNet2DModel
    encoder: Encoder
    conditioner: Conditioner
    scheduler: TrainingScheduler
    """The training schedule, made from the folder's config, whatever sampler that names: a DDPMScheduler, or of flow
    matching a FlowMatchEulerDiscreteScheduler."""
    family: Family
    make_pipeline: Callable[[Any], DiffusionPipeline]
    """A UNet -> the pipeline around it, with the folder's own sampler."""
    component_dirs: Mapping[str, Path] = field(default_factory=dict)
    """Frozen part -> the folder it was read from; a checkpoint in one file has none."""
    scheduler_changes: Mapping[str, Any] = field(default_factory=dict)
    """Entries of the scheduler's config, such as prediction_type, that are not as in its folder."""
    image_condition: ImageCondition | None = None
    """What the UNet is shown of a picture with x_t."""
    new_prediction_type: str | None = None
    """What the UNet is to predict, where that is not what its folder or file says."""

    @property
    def inpainting(self) -> bool:
        """Whether the image condition is that of an inpainting model; warns, as version 0.1 had it."""
        warnings.warn("DiffusionModel.inpainting is now DiffusionModel.image_condition", DeprecationWarning, 2)
        return isinstance(self.image_condition, Inpainting)

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction", "sample" or "flow"."""
        return self.scheduler.config.get("prediction_type", "flow")

    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline over the live UNet (no copy of any weight)."""
        return self.make_pipeline(self.unet)

    def to(self, device: torch.device | str) -> Self:
        """Move the UNet and the frozen parts."""
        self.unet.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType] # diffusers wraps nn.Module.to
        self.encoder.to(device)
        self.conditioner.to(device)
        return self


def load_model(
    name_or_path: str | Path | ModelInfo,
    *,
    resolution: int | None = None,
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    flow_shift: float | None = None,
    max_token_length: int = 77,
    clip_skip: int | None = None,
    tokenizer: str | None = None,
    vae: str | None = None,
    vae_scale: Sequence[float] | None = None,
    vae_shift: Sequence[float] | None = None,
    vae_reflection_padding: bool = False,
    weighted_captions: bool = False,
    seed: int = 0,
) -> DiffusionModel:
    """Load a model for training, on the CPU. VAE and text encoder are frozen, in eval mode and in fp32.

    Args:
        name_or_path: a name of `FAMILIES` such as sd15, a hub id, a local diffusers folder, a checkpoint in one
            safetensors file, or what `locate` returned.
        resolution: pixels per side of a `ddpm` from scratch; what a DDPM draws at; otherwise only checked. Default: the
            model's own.
        dtype: of the UNet's weights; fp32 to train them all, bf16 or fp16 halve the memory under a LoRA.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow"; default: as the scheduler config says. A model
            that was trained on noise or v still predicts it under "flow", see `Diff2Flow`.
        zero_terminal_snr: see `finetune.models.schedulers.scheduler_changes`.
        flow_shift: of a flow model's schedule, see `FlowMatching`; default: as the scheduler config says.
        max_token_length: 77, 150 or 225.
        clip_skip: hidden state of the text encoder to take, counted from the end, 1 = the last.
        tokenizer: for a checkpoint in one file, see `finetune.models.clip_tokenizer.clip_tokenizer`.
        vae: a diffusers folder, or a .safetensors file of a VAE, that takes the place of the model's own.
        vae_scale, vae_shift: see `finetune.models.vae_scale.rescale`.
        vae_reflection_padding: see `finetune.models.vae_scale.set_padding`; also where the VAE's config says it.
        weighted_captions: see `finetune.models.prompt_weights.parse_weights`.
        seed: of a from-scratch UNet's initial weights.

    Raises:
        UsageError: unknown name, or a resolution that the model cannot take.
        ModelError: a part is missing or damaged, or the hub is out of reach.
    """
    model_info = name_or_path if isinstance(name_or_path, ModelInfo) else locate(str(name_or_path))
    resolution = resolution or model_info.resolution
    check_resolution(model_info, resolution)
    if model_info.scratch:
        return _from_scratch(
            model_info,
            resolution,
            prediction_type=prediction_type,
            zero_terminal_snr=zero_terminal_snr,
            flow_shift=flow_shift,
            seed=seed,
        )
    source = open_source(model_info, tokenizer)
    config = dict(source.config("scheduler"))
    if prediction_type == "flow" and not source.prediction_stated:
        config = flow_config(config)
    changes: dict[str, Any] = {}
    if is_flow(config):
        refuse_for_flow(prediction_type, zero_terminal_snr)
        config |= {name: flow_shift for name in ("shift", "flow_shift") if name in config and flow_shift is not None}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(flow_config(config, flow_shift))
    else:
        changes = scheduler_changes(config, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
        scheduler = DDPMScheduler.from_config(config, **changes)
    unet = source.unet(dtype)
    if isinstance(unet, UNet2DModel):
        # Pipelines draw in the size of the config; the folder's own name would be the user's, in every export.
        unet.register_to_config(sample_size=resolution, _name_or_path="")
        return _pixel_model(model_info, unet, scheduler)
    sampler = make_sampler(source.place, config, changes)
    frozen = _frozen(
        model_info,
        source,
        max_token_length,
        clip_skip,
        vae,
        scale=vae_scale,
        shift=vae_shift,
        reflecting=vae_reflection_padding,
        weighted=weighted_captions,
    )

    def make_pipeline(unet: UNet2DConditionModel) -> DiffusionPipeline:
        own_sampler = sampler.from_config(sampler.config)
        return getattr(diffusers, model_info.family.pipeline)(unet=unet, scheduler=own_sampler, **frozen.components)

    return DiffusionModel(
        unet=unet,
        encoder=frozen.encoder,
        conditioner=frozen.conditioner,
        scheduler=scheduler,
        family=model_info.family,
        make_pipeline=make_pipeline,
        component_dirs=frozen.component_dirs,
        scheduler_changes=changes,
        image_condition=frozen.image_condition,
        new_prediction_type=changes.get("prediction_type") if source.prediction_stated else None,
    )


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers and diffusers for loading files."""
    loggers = [library for library in (transformers_logging, diffusers_logging) if library.is_progress_bar_enabled()]
    for library in loggers:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in loggers:
            library.enable_progress_bar()


def check_resolution(model_info: ModelInfo, resolution: int) -> None:
    """Raise UsageError, naming the nearest that fit, unless the model can take pictures of this size."""
    multiple = scratch_multiple(resolution) if model_info.scratch else model_info.multiple
    if resolution % multiple:
        below, above = resolution // multiple * multiple, -(-resolution // multiple) * multiple
        fitting = f"{below} and {above}" if below else str(above)
        raise UsageError(
            f"resolution = {resolution}: {model_info.name} takes multiples of {multiple} pixels; the nearest: {fitting}"
        )


def load_frozen(
    model_info: ModelInfo,
    *,
    max_token_length: int = 77,
    clip_skip: int | None = None,
    tokenizer: str | None = None,
    vae: str | None = None,
    vae_scale: Sequence[float] | None = None,
    vae_shift: Sequence[float] | None = None,
    vae_reflection_padding: bool = False,
    weighted_captions: bool = False,
) -> "Frozen":
    """What `load_model` puts around the UNet, without it. Raises as it does."""
    if not model_info.family.latent:
        return Frozen(PixelEncoder(), NoCondition())
    source = open_source(model_info, tokenizer)
    vae_options: dict[str, Any] = {"scale": vae_scale, "shift": vae_shift, "reflecting": vae_reflection_padding}
    return _frozen(model_info, source, max_token_length, clip_skip, vae, **vae_options, weighted=weighted_captions)


@dataclass
class Frozen:
    """What stays as it is, and computes what is learned from."""

    encoder: Encoder
    conditioner: Conditioner
    components: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline beside UNet and scheduler."""
    component_dirs: Mapping[str, Path] = field(default_factory=dict)
    """See `DiffusionModel`."""
    image_condition: ImageCondition | None = None
    """See `DiffusionModel`."""


def _frozen(
    model_info: ModelInfo,
    source: ModelSource,
    max_token_length: int,
    clip_skip: int | None,
    other_vae: str | None,
    *,
    scale: Sequence[float] | None,
    shift: Sequence[float] | None,
    reflecting: bool,
    weighted: bool,
) -> Frozen:
    try:
        with without_library_bars():
            files = {
                part: source.component_dirs(part)
                for part in model_info.family.components
                if part not in ("unet", "scheduler")
            }
            if other_vae is None:
                vae = source.vae()
            elif (file := Path(other_vae).expanduser()).is_file():
                vae, files["vae"] = vae_from_file(file, model_info.family.layout or model_info.family.name), None
            else:
                files["vae"] = _vae_folder(file)
                vae = _other_vae(files["vae"], source)
            text: dict[str, Any] = {}
            for part in model_info.family.components:
                if part.startswith("text_encoder"):
                    text[part] = source.text_encoder(part)
                elif part.startswith("tokenizer"):
                    text[part] = source.tokenizer(part)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source.place} cannot be loaded: {str(error).splitlines()[0]}") from error
    vae.register_to_config(_name_or_path="")  # or an export would name the user's folder
    if (padding := "reflect" if reflecting else vae.config.get("padding_mode", "zeros")) != "zeros":
        set_padding(vae, padding)
        files["vae"] = None if reflecting else files["vae"]
    if scale is not None or shift is not None or vae.config.get("shift_factor"):
        rescale(vae, scale, shift)
        files["vae"] = None  # it is no longer as in its files
    layers = text["text_encoder"].config.num_hidden_layers
    if clip_skip is not None and clip_skip > layers:
        raise UsageError(f"clip_skip = {clip_skip}: expected 1 to {layers}, the layers of the text encoder")
    if "text_encoder_2" in text:
        zeros = source.config("model_index").get("force_zeros_for_empty_prompt", True)
        conditioner = SdxlConditioner(
            (text["tokenizer"], text["tokenizer_2"]),
            (text["text_encoder"], text["text_encoder_2"]),
            max_token_length=max_token_length,
            clip_skip=clip_skip,
            zeros_for_empty=zeros,
            weighted=weighted,
        )
        more = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    else:
        conditioner = ClipConditioner(text["tokenizer"], text["text_encoder"], max_token_length, clip_skip, weighted)
        more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return Frozen(
        VaeEncoder(vae),
        conditioner,
        components={"vae": vae, **text, **more},
        component_dirs={part: folder for part, folder in files.items() if folder},
        image_condition=image_condition_of(model_info.family.image_condition),
    )


def _vae_folder(folder: Path) -> Path:
    """A VAE's own folder, or that in a model's. Raises ModelError where there is neither."""
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    raise ModelError(f"vae {folder}: no config.json there, nor in vae/; expected a diffusers folder")


def _other_vae(folder: Path, source: ModelSource) -> AutoencoderKL:
    """The VAE in another folder. Raises ModelError for one with other latents."""
    vae = vae_from(folder)
    vae_config = source.config("vae")
    for name, ours, theirs in (
        ("latent channels", vae_config["latent_channels"], vae.config["latent_channels"]),
        ("levels", len(vae_config["block_out_channels"]), len(vae.config["block_out_channels"])),
    ):
        if ours != theirs:
            raise ModelError(f"vae {folder}: it has {theirs} {name}, the model needs {ours}")
    return vae


def _from_scratch(
    model_info: ModelInfo,
    resolution: int,
    *,
    prediction_type: str | None,
    zero_terminal_snr: bool | None,
    flow_shift: float | None,
    seed: int,
) -> DiffusionModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = scratch_unet(resolution)
    if prediction_type == "flow":
        refuse_for_flow(prediction_type, zero_terminal_snr)
        return _pixel_model(model_info, unet, FlowMatchEulerDiscreteScheduler.from_config(flow_config({}, flow_shift)))
    changes = scheduler_changes({}, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr)
    return _pixel_model(model_info, unet, DDPMScheduler(num_train_timesteps=1000, **changes))


def scratch_unet(resolution: int) -> UNet2DModel:
    """A UNet2DModel to be trained from nothing, its weights drawn from torch's generator.

    Above 64 px: that of the Hugging Face tutorial "Train a diffusion model" (113.7 M parameters). Up to 64 px:
    the same idea at half the width and four levels.
    """
    if resolution <= 64:
        return UNet2DModel(
            sample_size=resolution,
            block_out_channels=(64, 128, 128, 256),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        )
    return UNet2DModel(
        sample_size=resolution,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    )


def _pixel_model(model_info: ModelInfo, unet: UNet2DModel, scheduler: TrainingScheduler) -> DiffusionModel:
    def make_pipeline(unet: UNet2DModel) -> DiffusionPipeline:
        return getattr(diffusers, model_info.family.pipeline)(unet=unet, scheduler=scheduler)

    return DiffusionModel(
        unet=unet.eval(),
        encoder=PixelEncoder(),
        conditioner=NoCondition(),
        scheduler=scheduler,
        family=model_info.family,
        make_pipeline=make_pipeline,
    )

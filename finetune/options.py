"""Every option of a run, written once: type, default, meaning, and what else there is to know of it. Free of torch.

The sections group the options for `--help` and for the TOML file. An option whose default depends on the model, the
pictures or the machine is None here until the run decides it (`finetune/run/resolve_config.py`). What the rest of the
package asks about options (is it only for LoRA? may a resume change it?) is answered by `finetune/option_info.py`'s
`OptionInfo`, never by a list of names.
"""

import ast
import dataclasses
import inspect
import typing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from finetune.optimizer_table import OPTIMIZERS
from finetune.option_info import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    STEPS_OR_SHARE,
    OptionInfo,
    Range,
    info_of_field,
    option,
)

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "rex", "wsd")
_OWN = "package.module:name"
SCHEDULE = Range(f"{', '.join(SCHEDULES)} or {_OWN}", lambda value: value in SCHEDULES or ":" in str(value))
OPTIMIZER = Range(f"{', '.join(OPTIMIZERS)} or {_OWN}", lambda value: value in OPTIMIZERS or ":" in str(value))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model and adapter."""

    model: str = option("tiny", aliases=("pretrained_model_name_or_path",), path=True)
    """sd15, sd21, sd21-base, sdxl, ddpm, tiny, sd15-inpainting (sd21-, sdxl-), a hub id (owner/name), a diffusers
    folder, or a .safetensors file."""
    tokenizer: str | None = option(None, requires="a checkpoint in one file", path=True)
    """Tokenizer of a checkpoint in one file: a folder, or bpe_simple_vocab_16e6.txt.gz. Default: from the package
    open_clip, or from the hub cache."""
    method: Literal["lora", "full"] | None = None
    """lora: train a small adapter (default for latent models). full: train all weights of the UNet (default for
    ddpm)."""
    lora_type: Literal["lora", "rslora", "dora", "loha", "lokr"] = option(
        "lora", requires="method lora", suggest_for=("algo", "peft_type", "use_dora", "use_rslora", "network_module")
    )
    """lora; rslora: scaled by alpha / sqrt(rank), for high ranks; dora: also learns the norm of each row; loha, lokr:
    products of factors, which reach higher ranks with fewer weights (LyCORIS)."""
    rank: int = option(16, AT_LEAST_ONE, requires="method lora", suggest_for=("network_dim",))
    """LoRA rank."""
    lora_alpha: float | None = option(None, POSITIVE, requires="method lora", suggest_for=("network_alpha",))
    """LoRA alpha. The update is scaled by alpha / rank. Default: the rank."""
    lora_dropout: float = option(
        0.0, BELOW_ONE, requires="lora_type lora, rslora or dora", suggest_for=("network_dropout",)
    )
    """Dropout inside the LoRA layers, in [0, 1)."""
    rank_dropout: float = option(0.0, BELOW_ONE, requires="method lora")
    """Share of the ranks of the adapter that a step leaves out, in [0, 1)."""
    module_dropout: float = option(0.0, BELOW_ONE, requires="method lora")
    """Share of the adapter's layers that a step leaves out, in [0, 1)."""
    lokr_factor: int | None = option(None, AT_LEAST_ONE, requires="lora_type lokr", suggest_for=("decompose_factor",))
    """Size of the smaller factor of a LoKr, as far as it divides the layer. Default: near the square root of the
    layer's size. A rank above the larger factor's keeps that one whole."""
    scale_weight_norms: float | None = option(None, POSITIVE, requires="lora_type lora or rslora")
    """Keep the norm of each layer's update below this; 1 is usual."""
    lora_target_modules: tuple[str, ...] | None = option(
        None, requires="method lora", suggest_for=("lora_layers", "layer_filter", "lora_layer_preset")
    )
    """Layers that get an adapter: attn-only, attn-mlp (all of the transformers), full, or ends or patterns of their
    names (to_q, up_blocks.*.to_k). Default: attention and feed-forward."""
    conv_rank: int | None = option(
        None, AT_LEAST_ONE, requires="method lora", suggest_for=("conv_dim", "network_conv_dim")
    )
    """Also adapt the residual blocks (LoCon), and convolutions with a kernel larger than 1 x 1 with this rank."""
    conv_alpha: float | None = option(None, POSITIVE, requires="conv_rank")
    """Alpha of these convolutions. Default: conv_rank."""
    block_rank: tuple[str, ...] | None = option(
        None, requires="method lora", suggest_for=("rank_pattern", "block_dims")
    )
    """Ranks of single blocks, by the start of layer names: up_blocks.1=32 mid=8. Alpha is the same for all."""
    init_lora: str | None = option(None, requires="method lora", suggest_for=("network_weights",), path=True)
    """LoRA file to start from, in kohya's or peft's format, with the same layers and rank."""
    train_modules: tuple[str, ...] | None = option(
        None, requires="method full", suggest_for=("trainable_modules", "layer_filter_regex")
    )
    """Layers of the UNet that learn, by ends or patterns of their names (attn2, up_blocks.*.to_k). Default: all."""
    vae: str | None = option(
        None, requires="text", suggest_for=("pretrained_vae_model_name_or_path", "vae_name"), path=True
    )
    """Diffusers folder or .safetensors file with a VAE that replaces the model's own."""
    vae_scale: tuple[float, ...] | None = option(None, POSITIVE, requires="text", suggest_for=("vae_custom_scale",))
    """Factor that latents are scaled by, or one for each channel, where the model is used to another one than its VAE's
    config says (EQ-VAEs)."""
    vae_shift: tuple[float, ...] | None = option(None, requires="text", suggest_for=("vae_custom_shift",))
    """What is taken from latents before that, or one number for each channel."""
    vae_reflection_padding: bool = option(False, requires="text")
    """Pad the VAE's convolutions by reflection, as EQ-VAEs are trained; most programs that draw with them pad by
    zeros."""
    gradient_checkpointing: bool | float = option(False, SHARE)
    """Recompute activations in the backward pass: less memory for a third more arithmetic. A number: only in this share
    of the blocks, in the order of memory saved per time."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option("auto", affects="machine")
    """Number format of the UNet's computation. auto: bf16 where the hardware multiplies it natively (CPUs included),
    else fp16 on a GPU and no on a CPU."""
    full_bf16: bool | None = option(
        None, requires="method full, no use_ema, and optimizer adamw, adamw8bit, adafactor or sgd"
    )
    """Keep trained weights in bf16 only, with stochastic rounding: 4 to 8 bytes less per weight. Works best with
    adamw8bit and adafactor. Gradients are accumulated in bf16 too."""
    fused_backward_pass: bool | None = option(None, requires="full_bf16")
    """Update weights during the backward pass and never hold the whole gradient: 2 bytes less per weight. For steps of
    one forward pass (with buckets: of one image), without clipping, in one process."""
    compile: bool | None = option(None, affects="machine", suggest_for=("torch_compile", "compile_unet"))
    """Compile the UNet's blocks with torch.compile. Default: on a GPU, if the run is long enough to recover the
    time."""
    cuda_graphs: bool = option(True, affects="machine")
    """On a GPU, launch a step as one CUDA graph instead of kernel by kernel, if it fits into memory."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images and captions."""

    data: tuple[str, ...] = option((), aliases=("train_data_dir", "instance_data_dir", "dataset_name"), path=True)
    """Folder of images, tar shards (shards/*.tar), folder of parquet or arrow files, or Hugging Face dataset id; or
    several of them. Or a dataset file (.toml) with a [[source]] for each, or of sd-scripts."""
    repeats: tuple[int, ...] = option((), AT_LEAST_ONE, suggest_for=("num_repeats",))
    """Repeats per epoch of the images of each --data, in the same order. Default: 1."""
    source_settings: tuple[str, ...] = option(())
    """Options that are otherwise for the images of each --data, in the same order, as TOML: 'prompt = "a dog",
    resolution = 768, loss_weight = 0.5'; '' for none."""
    class_data: str | None = option(
        None, requires="text", aliases=("class_data_dir",), suggest_for=("reg_data_dir",), path=True
    )
    """Folder of images of the subject's class, trained together with the subject so that the class is not forgotten
    (DreamBooth). The model draws missing images."""
    class_prompt: str | None = option(None, requires="class_data")
    """Caption of class images that have no caption, and prompt for the missing ones: "a photo of a dog"."""
    num_class_images: int | None = option(None, AT_LEAST_ONE, requires="class_data")
    """Number of class images. Default: those in the folder, or 100 if it is empty."""
    prior_loss_weight: float | None = option(None, POSITIVE, requires="class_data")
    """Loss weight of class images, relative to the subject's. Default: 1."""
    prior_prediction: bool | None = option(None, requires="class images")
    """Train class images towards the untrained model's output instead of their noise, so that no detail of these images
    is learned."""
    prompt: str | None = option(
        None, requires="text", aliases=("instance_prompt",), suggest_for=("caption",), decided_by="transform"
    )
    """Caption of every image that has none."""
    trigger: str | None = option(None, requires="text", decided_by="transform")
    """Word put in front of every caption that does not have it, or in place of [trigger] in the caption."""
    masked_loss: bool | None = option(None, suggest_for=("alpha_mask",), decided_by="dataset")
    """Count the loss only where a mask is white: NAME.mask.png next to the image, or else its alpha channel. Default:
    use such files only. Inpainting models paint in the white area instead."""
    resolution: int | None = option(None, AT_LEAST_ONE, aliases=("image_size",), several=True)
    """Pixels per side. With buckets: no image has a larger area than this square. Several: each image is trained at
    each of them. Default: the model's resolution."""
    aspect_ratio_bucketing: bool | None = option(None, decided_by="transform", suggest_for=("enable_bucket",))
    """Train each image near its own aspect ratio, with at most as many pixels as the square. Default: on, except for
    pixel-space models and --resize_mode squash."""
    min_bucket_reso: int | None = option(None, AT_LEAST_ONE, requires="aspect_ratio_bucketing")
    """Shortest side of a bucket. Default: half of the resolution."""
    max_bucket_reso: int | None = option(None, AT_LEAST_ONE, requires="aspect_ratio_bucketing")
    """Longest side of a bucket. Default: twice the resolution."""
    bucket_reso_steps: int | None = option(
        None, AT_LEAST_ONE, requires="aspect_ratio_bucketing", suggest_for=("bucket_resolution_steps",)
    )
    """Sides of buckets are multiples of this. Default: 64; below 512 px an eighth of the resolution."""
    bucket_upscale: bool | None = option(None, requires="aspect_ratio_bucketing", suggest_for=("bucket_no_upscale",))
    """Enlarge images that are smaller than their bucket, instead of using a smaller bucket."""
    resize_mode: Literal["crop", "squash"] = option("crop", decided_by="transform")
    """crop: scale to cover the training size, then crop. squash: scale both sides to it, as the tutorial does."""
    center_crop: bool = option(True, decided_by="transform")
    """Crop the centre. With --no_center_crop, crop at a random place, drawn once per image (with --live_encoding once
    per visit)."""
    random_flip: bool = option(False, decided_by="transform", suggest_for=("flip_aug",))
    """Mirror half of the visits left to right."""
    background: str = option("white", decided_by="transform")
    """Colour behind transparent images (black, #ff8000)."""
    caption_dropout: float | None = option(None, BELOW_ONE, requires="text", suggest_for=("caption_dropout_rate",))
    """Share of visits with an empty caption. Default: 0.05 if captions vary, else 0."""
    caption_source: Literal["files", "filename", "prompt"] = option(
        "files", requires="text", suggest_for=("caption_strategy", "prompt_source"), decided_by="dataset"
    )
    """files: captions are in .txt files, metadata files or a column. filename: the name of the image is its caption,
    without a number at its end and with spaces for underscores. prompt: --prompt is the caption of every image."""
    caption_lines: Literal["joined", "chosen", "first"] = option("joined", requires="text")
    """joined: the lines of a file are one caption. chosen: each line is a caption, and each visit uses one of them.
    first: the other lines are left out."""
    caption_prefix: str | None = option(None, requires="text")
    """Text in front of each caption."""
    caption_suffix: str | None = option(None, requires="text")
    """Text behind each caption."""
    shuffle_caption: bool = option(False, requires="text")
    """Shuffle the tags of a caption, its comma-separated parts, at each visit. Captions are then encoded at each
    visit."""
    caption_tag_dropout: float = option(0.0, BELOW_ONE, requires="text", aliases=("caption_tag_dropout_rate",))
    """Share of the tags that each visit leaves out."""
    keep_tokens: int | None = option(None, NOT_NEGATIVE, requires="shuffle_caption or caption_tag_dropout")
    """Number of tags at the start that stay in place and are never left out. Default: 0."""
    caption_separator: str = option(",", requires="shuffle_caption or caption_tag_dropout")
    """What separates tags."""
    keep_tokens_separator: str | None = option(None, requires="shuffle_caption or caption_tag_dropout")
    """Mark in a caption before which tags stay in place, instead of keep_tokens, and behind a second one too: |||."""
    secondary_separator: str | None = option(None, requires="text")
    """Separates tags that stay together; becomes caption_separator in the end: ;;;."""
    enable_wildcard: bool = option(False, requires="text", suggest_for=("wildcards",))
    """Take one part of {a|b|c} in a caption at each visit."""
    max_token_length: Literal[77, 150, 225] = option(77, requires="text")
    """Maximum caption length in tokens. 150 and 225 are encoded in chunks of 75."""
    clip_skip: int | None = option(None, AT_LEAST_ONE, requires="text")
    """Use the text encoder's hidden state this many layers from the end (1: the last layer, as in sd-scripts and
    A1111)."""
    volume_size: int | None = option(None, NOT_NEGATIVE, decided_by="dataset")
    """Number of images that are read at a time; 0: all before the first step. Default: 8192 if there are more than
    32768."""
    max_bad_fraction: float = option(0.01, BELOW_ONE, affects="free")
    """Share of the images that may be unreadable. They are skipped and listed in quarantine.jsonl."""
    image_column: str = option("image", decided_by="dataset")
    """Image column of a Hugging Face dataset."""
    caption_column: str = option("text", decided_by="dataset")
    """Caption column of a Hugging Face dataset, or of metadata.jsonl, .csv or .parquet next to images."""
    follow_links: bool = option(True, affects="free")
    """Follow links that lead out of the --data folder. With --no_follow_links they are an error."""
    stream_rows: int | None = option(None, AT_LEAST_ONE, decided_by="dataset")
    """Download only this many rows of a dataset on the hub, in their order, and keep them."""
    live_encoding: bool = False
    """Encode each image with the VAE at every visit instead of once."""
    encode: Literal["auto", "before", "ahead"] = option("auto", affects="free")
    """before: encode everything before the first step. ahead: encode each image when the run reaches it. auto: before,
    unless it takes more than a minute. Affects speed only."""
    cache_dir: str | None = option(None, affects="free", suggest_for=("latents_cache_path", "cache_latents_to_disk"))
    """Folder where encodings are cached for this run and later ones; none: cache in memory only. Default: finetune-unet
    in the user's cache folder."""
    cache_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of cached encodings. fp16 takes half the space (error: see benchmarks/RESULTS.md)."""
    cache_any_environment: bool = option(False, affects="free")
    """Also use cached encodings from other devices, numbers of threads or library versions. The last bits of the result
    then depend on the contents of the cache."""
    cache_strict: bool = option(False, affects="free")
    """Hash every image at the start, even if size, time and inode show that the file is unchanged."""
    dataloader_num_workers: int = option(0, NOT_NEGATIVE, affects="free", suggest_for=("max_data_loader_n_workers",))
    """Number of processes that load images with --live_encoding; cached encodings need none. Affects speed only."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training. A step is one optimizer step."""

    max_train_steps: int | None = option(None, AT_LEAST_ONE, affects="length", suggest_for=("steps",))
    """Length of the run in optimizer steps."""
    num_train_epochs: int | None = option(
        None, AT_LEAST_ONE, affects="length", aliases=("num_epochs",), suggest_for=("epochs", "max_train_epochs")
    )
    """Length of the run in epochs (max_train_steps takes precedence)."""
    max_train_minutes: float | None = option(None, POSITIVE, affects="free")
    """Stop with a checkpoint after this many minutes, before a cluster's time limit; exit code 124. The same command
    resumes the run."""
    train_batch_size: int | None = option(None, AT_LEAST_ONE, suggest_for=("batch_size",))
    """Images per device in one forward pass."""
    gradient_accumulation_steps: int | None = option(None, AT_LEAST_ONE)
    """Forward passes per optimizer step in each process. Default: 1 (sdxl: 4)."""
    num_processes: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Number of processes whose batches form a step. Default: the number that is launched. A resume keeps the number
    that the run began with, on any number of processes."""
    learning_rate: float | None = option(None, POSITIVE, suggest_for=("lr", "unet_lr"))
    """Peak learning rate of the schedule."""
    block_learning_rate: tuple[str, ...] | None = option(
        None, requires="an optimizer other than prodigy", suggest_for=("block_lr", "down_lr_weight", "up_lr_weight")
    )
    """Factors of the learning rate, by the start of layer names: up_blocks=2 mid=0.5."""
    loraplus_lr_ratio: float = option(1.0, POSITIVE, requires="LoRA or DoRA, and an optimizer other than prodigy")
    """Factor of the learning rate of LoRA's matrix B (LoRA+, Hayou et al. 2024); 16 is usual."""
    lr_scheduler: (
        Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "rex", "wsd"]
        | str
        | None
    ) = option(None, SCHEDULE, suggest_for=("learning_rate_scheduler",))
    """Shape of the learning rate after the warm-up. wsd: constant, then a decay. Or package.module:function, called as
    f(step, peak=, warmup=, total=)."""
    lr_warmup_steps: int | float | None = option(None, STEPS_OR_SHARE, suggest_for=("warmup_ratio", "lr_warmup"))
    """Steps in which the learning rate rises from 0; below 1: a share of the run. Default: min(100, 5 % of the run)."""
    lr_end: float | None = option(None, NOT_NEGATIVE, requires="a schedule that has an end", suggest_for=("lr_min",))
    """Learning rate at the end. Default: 0; of polynomial 1e-7."""
    lr_num_cycles: int = option(
        1, AT_LEAST_ONE, requires="lr_scheduler cosine_with_restarts", suggest_for=("lr_scheduler_num_cycles",)
    )
    """Number of cosines."""
    lr_power: float = option(1.0, POSITIVE, requires="lr_scheduler polynomial", suggest_for=("lr_scheduler_power",))
    """Power of the polynomial."""
    lr_decay_steps: int | float | None = option(None, STEPS_OR_SHARE, requires="lr_scheduler wsd")
    """Steps of the decay; below 1: a share of the run. Default: a fifth of the run."""
    optimizer: Literal[
        "adamw", "adamw8bit", "adafactor", "prodigy", "sgd", "ademamix", "adopt", "came", "lion", "muon",
        "prodigy_schedulefree", "schedulefree_adamw", "schedulefree_sgd", "soap", "stableadamw"
    ] | str = option("adamw", OPTIMIZER, suggest_for=("optimizer_type",))  # fmt: skip
    """Optimizer, or package.module:Class. The default learning rate depends on it. adamw8bit keeps its moments in 8
    bits. All but adamw, adafactor and sgd need pip install 'finetune-unet[optimizers]'."""
    optimizer_args: tuple[str, ...] = ()
    """Further arguments of the optimizer's class: weight_decay=0.1 betas=0.9,0.99."""
    adam_beta1: float | None = option(None, BELOW_ONE, requires="an optimizer of the Adam family")
    """Decay of AdamW's first moment."""
    adam_beta2: float = option(0.999, BELOW_ONE, requires="an optimizer of the Adam family")
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = option(0.01, NOT_NEGATIVE)
    """Decoupled weight decay."""
    adam_epsilon: float = option(1e-8, POSITIVE, requires="an optimizer of the Adam family")
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, NOT_NEGATIVE)
    """Clip the gradient to this norm; 0: no clipping. fused_backward_pass also turns it off."""
    max_bad_steps: int = option(1, AT_LEAST_ONE, affects="on resume")
    """End the run after this many steps in a row whose loss or gradient is not finite. Such steps change no weight;
    faults.jsonl records them."""
    use_ema: bool | None = option(None, suggest_for=("ema",))
    """Keep an exponential moving average (EMA) of the weights and export it."""
    ema_inv_gamma: float = option(1.0, POSITIVE, requires="use_ema")
    """The EMA decay at step s is 1 - (1 + s / inv_gamma) ** -power, at most ema_max_decay."""
    ema_power: float = option(0.75, POSITIVE, requires="use_ema")
    """See ema_inv_gamma."""
    ema_max_decay: float = option(0.9999, BELOW_ONE, requires="use_ema")
    """See ema_inv_gamma."""
    deterministic: bool = option(False, affects="on resume")
    """On a GPU, use deterministic algorithms only; they are slower. A CPU always does."""
    seed: int = option(0, NOT_NEGATIVE)
    """Seed of all random numbers: order, noise, timesteps, crops, flips, initial weights."""


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
    multires_noise_iterations: int = option(0, NOT_NEGATIVE)
    """Number of coarser noises that are added to the noise (pyramid noise); 6 to 10 is usual."""
    multires_noise_discount: float = option(0.3, BELOW_ONE, requires="multires_noise_iterations")
    """Factor by which each coarser noise is weaker than the one before it."""
    input_perturbation: float = option(0.0, NOT_NEGATIVE, aliases=("ip_noise_gamma",))
    """Strength of extra noise in the UNet's input (Ning et al. 2023); 0.1 is usual."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation: the loss on images that are not trained on."""

    validation_fraction: float | None = option(None, BELOW_ONE, requires="validation_data left out")
    """Share of the images that is held out for validation; near duplicates stay together; 0: none. Default: 0.1, at
    most 200 images, and none of fewer than 20."""
    validation_data: str | None = option(None, suggest_for=("validation_data_dir", "val_data"), path=True)
    """Images to hold out instead, in the forms that --data takes."""
    validate_every: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Steps between validations, in addition to the first and the last. Default: as 5 % of the time allows; with
    --early_stop a twentieth of the run."""
    early_stop: bool = option(False, affects="on resume")
    """Stop when the validation loss has risen significantly in two validations, and export the weights with the lowest
    loss."""
    forgetting_prompts: int | None = option(None, NOT_NEGATIVE, requires="a model that takes text", affects="on resume")
    """Number of unrelated prompts, of 64, whose change in meaning is tracked; 0: none. Default: as 2 % of the time
    allows."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Images drawn during training."""

    sample_prompts: tuple[str, ...] | None = option(
        None,
        requires="text",
        affects="on resume",
        aliases=("validation_prompts",),
        suggest_for=("validation_prompt",),
        path=True,
    )
    """Prompts of the sample grids, or a file with one per line (with sd-scripts' --n --s --l --d). Default: a training
    caption, the subject in a new place, and the class alone."""
    sample_every: int | None = option(
        None, NOT_NEGATIVE, affects="on resume", aliases=("validation_steps",), suggest_for=("sample_every_n_steps",)
    )
    """Steps between sample grids, in addition to the first and the last; 0: none. Default: as 5 % of the time
    allows."""
    save_image_epochs: int | None = option(
        None,
        AT_LEAST_ONE,
        requires="sample_every left out",
        affects="on resume",
        suggest_for=("sample_every_n_epochs",),
    )
    """Epochs between sample grids."""
    eval_batch_size: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Images per prompt in a grid."""
    num_inference_steps: int | None = option(
        None, NOT_NEGATIVE, affects="on resume", suggest_for=("ddpm_num_inference_steps",)
    )
    """Sampler steps per image; 0: no sampling."""
    guidance_scale: float | None = option(None, NOT_NEGATIVE, requires="a model that takes text", affects="on resume")
    """Classifier-free guidance of the grids; 1: none. Default: the model's (sd15: 7.5, sdxl: 5, tiny: 3)."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files that are written."""

    output_dir: str | None = option(None, affects="free", suggest_for=("output",))
    """Run folder. Default: runs/<data>-<model>. The same command resumes it; another config gets a new number."""
    lock_output_dir: bool = option(True, affects="free")
    """Lock the folder against a second run. Use --no_lock_output_dir on file systems that cannot lock files."""
    overwrite_output_dir: bool = option(False, affects="free")
    """Delete what an earlier run left in output_dir."""
    resume_from_checkpoint: str | None = option(None, affects="free", suggest_for=("resume",))
    """"latest", or the path of a checkpoint folder."""
    allow_changed: tuple[str, ...] = option((), affects="free")
    """Options that may differ from the run that is resumed (for "data" and "model" also their contents). The run
    continues with the new values."""
    checkpointing_steps: int = option(
        500, NOT_NEGATIVE, affects="on resume", suggest_for=("save_every_n_steps", "save_steps")
    )
    """Steps between checkpoints, in addition to the one at the end; 0: only at the end."""
    checkpointing_minutes: float | None = option(None, POSITIVE, affects="on resume")
    """Minutes between checkpoints, in addition to checkpointing_steps. SIGUSR1 also saves a checkpoint."""
    save_model_epochs: int | None = option(
        None, AT_LEAST_ONE, affects="on resume", suggest_for=("save_every_n_epochs",)
    )
    """Epochs between checkpoints, in addition to checkpointing_steps."""
    checkpoints_total_limit: int = option(
        2, NOT_NEGATIVE, affects="on resume", suggest_for=("save_last_n_steps_state",)
    )
    """Number of checkpoints to keep; 0: all."""
    export_formats: tuple[Literal["single-file", "diffusers", "unet"], ...] = option(
        (), affects="free", inherited=True, suggest_for=("output_model_format",)
    )
    """Formats that are also written to exports/ of the run folder at the end, with a LoRA merged into the model."""
    export_precision: Literal["fp32", "fp16", "bf16"] = option(
        "fp16", affects="free", inherited=True, suggest_for=("output_dtype",)
    )
    """Number format of export_formats. A LoRA's own files are fp32."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), affects="free", inherited=True, suggest_for=("log_with",)
    )
    """Trackers that receive the metrics, in addition to metrics.jsonl."""
    tracker_project_name: str | None = option(
        None, requires="report_to", affects="free", inherited=True, suggest_for=("log_tracker_name", "wandb_project")
    )
    """Project name for the trackers. Default: the environment variable WANDB_PROJECT, or finetune-unet."""
    push_to_hub: bool = option(False, affects="free")
    """Upload the result and a model card to the Hugging Face hub."""
    hub_model_id: str | None = option(None, requires="push_to_hub", affects="free")
    """Repository to push to. Default: one with the name of the run folder under your account, if it is new."""
    hub_private_repo: bool | None = option(None, requires="push_to_hub", affects="free")
    """Create the repository as private. Default: yes; --no_hub_private_repo makes it public."""


ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The layers that a LoRA adapts unless the model's family says otherwise."""

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "objective": ObjectiveOptions,
    "validation": ValidationOptions,
    "samples": SampleOptions,
    "output": OutputOptions,
}


@cache
def option_types() -> dict[str, Any]:
    """Option name -> its type hint, in the order of the sections."""
    hints: dict[str, Any] = {}
    for section in SECTIONS.values():
        hints |= typing.get_type_hints(section)
    return hints


@cache
def option_info() -> dict[str, OptionInfo]:
    """Option name -> what is known about it, in the order of the sections."""
    fields = [field for section in SECTIONS.values() for field in dataclasses.fields(section)]
    return {field.name: info_of_field(field) for field in fields}


def meanings(section: type) -> dict[str, str]:
    """Option name -> the docstring below it, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        option.target.id: inspect.cleandoc(text.value.value)
        for option, text in pairwise(definition.body)
        if isinstance(option, ast.AnnAssign)
        and isinstance(option.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }

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

from finetune.option_info import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    OptionInfo,
    info_of_field,
    option,
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What learns."""

    model: str = option("tiny", names=("pretrained_model_name_or_path",), path=True)
    """sd15, sd21, sd21-base, sdxl, ddpm, tiny, sd15-inpainting (sd21-, sdxl-), a hub id (owner/name), a folder of
    diffusers, or a .safetensors file."""
    tokenizer: str | None = option(None, needs="a checkpoint in one file", path=True)
    """For a checkpoint in one file: a tokenizer's folder, or bpe_simple_vocab_16e6.txt.gz. Default: from the package
    open_clip, or the hub's cache."""
    method: Literal["lora", "full"] | None = None
    """lora: train a small adapter (default for latent models). full: every weight of the UNet (default for ddpm)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(None, called=("v_parameterization",))
    """What the UNet predicts. Default: as the model's scheduler config says."""
    lora_type: Literal["lora", "rslora", "dora", "loha", "lokr"] = option(
        "lora", needs="method lora", called=("algo", "peft_type", "use_dora", "use_rslora", "network_module")
    )
    """lora; rslora: scaled by alpha / sqrt(rank), for high ranks; dora: learns each row's norm too; loha, lokr:
    products of factors that reach higher ranks with fewer weights (LyCORIS)."""
    rank: int = option(16, AT_LEAST_ONE, needs="method lora", called=("network_dim",))
    """LoRA rank."""
    lora_alpha: float | None = option(None, POSITIVE, needs="method lora", called=("network_alpha",))
    """LoRA alpha; the update is scaled by alpha / rank. Default: equal to rank."""
    lora_dropout: float = option(0.0, BELOW_ONE, needs="lora_type lora, rslora or dora", called=("network_dropout",))
    """Dropout inside the LoRA layers, in [0, 1)."""
    lora_target_modules: tuple[str, ...] | None = option(None, needs="method lora")
    """Layer names (their endings) that get an adapter. Default: attention and feed-forward."""
    block_rank: tuple[str, ...] | None = option(None, needs="method lora", called=("rank_pattern", "block_dims"))
    """Ranks of their own, by the beginning of layer names: up_blocks.1=32 mid=8. Alpha is the same for all."""
    init_lora: str | None = option(None, needs="method lora", called=("network_weights",), path=True)
    """A LoRA file to go on from, in kohya's or peft's layout, of the same layers and rank."""
    vae: str | None = option(None, needs="text", called=("pretrained_vae_model_name_or_path", "vae_name"), path=True)
    """A diffusers folder, or a .safetensors file, whose VAE takes the place of the model's own."""
    gradient_checkpointing: bool | float = option(False, SHARE)
    """Recompute activations in the backward pass: less memory for a third more arithmetic. A number: in this share of
    the blocks, those first that give back the most memory for their time."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option("auto", change="machine")
    """What the UNet computes in. auto: bf16 where the hardware multiplies it natively (CPUs included), else fp16 on a
    GPU and no on a CPU."""
    full_bf16: bool | None = option(None, needs="method full, no use_ema, and an optimizer other than prodigy")
    """Keep what learns in bf16 alone, rounded at random: 4 to 8 bytes less a weight; best with adamw8bit, adafactor.
    Gradients are added up in bf16 too, where a step has several forward passes."""
    fused_backward_pass: bool | None = option(None, needs="full_bf16")
    """Update weights in the middle of the backward pass, and never keep all of the gradient: 2 bytes less a weight. In
    steps of one forward pass (with buckets, of one picture), without clipping, in one process."""
    compile: bool | None = option(None, change="machine", called=("torch_compile", "compile_unet"))
    """torch.compile the UNet's blocks. Default: on a GPU, where the run is long enough to win the time back."""
    cuda_graphs: bool = option(True, change="machine")
    """On a GPU, launch a step as a whole instead of kernel by kernel, where it fits into memory."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Pictures and captions."""

    data: tuple[str, ...] = option((), names=("train_data_dir", "instance_data_dir", "dataset_name"), path=True)
    """A folder of pictures, tar shards (shards/*.tar), a folder of parquet/arrow files, or a Hugging Face dataset id;
    or several. Or the dataset file of sd-scripts (.toml), whose settings hold where no others are given."""
    repeats: tuple[int, ...] = option((), AT_LEAST_ONE, called=("num_repeats",))
    """How many times the pictures of each --data come in an epoch, in the same order. Default: once."""
    class_data: str | None = option(None, needs="text", names=("class_data_dir",), called=("reg_data_dir",), path=True)
    """A folder of pictures of the kind that the subject is of, learned beside it so that the kind is not forgotten
    (DreamBooth). What is missing there is drawn by the model."""
    class_prompt: str | None = option(None, needs="class_data")
    """Their caption, where they have none of their own, and what is drawn: "a photo of a dog"."""
    num_class_images: int | None = option(None, AT_LEAST_ONE, needs="class_data")
    """How many there should be. Default: those that are there, else 100."""
    prior_loss_weight: float | None = option(None, POSITIVE, needs="class_data")
    """How much they count beside the subject. Default: 1."""
    prior_prediction: bool | None = option(None, needs="class_data")
    """Teach with them what the untrained model answers, and not what is particular about these pictures."""
    prompt: str | None = option(
        None, needs="text", names=("instance_prompt",), called=("caption",), decided_by="transform"
    )
    """Caption for every picture that has none of its own."""
    trigger: str | None = option(None, needs="text", decided_by="transform")
    """A word placed before every caption, or where the caption says [trigger]."""
    masked_loss: bool | None = option(None, called=("alpha_mask",), decided_by="dataset")
    """Let errors count where a mask is white: NAME.mask.png beside a picture, else its alpha channel. Default: by such
    files alone. Inpainting models paint there instead."""
    resolution: int | None = option(None, AT_LEAST_ONE, names=("image_size",))
    """Pixels per side; with buckets, of the square that no picture's area exceeds. Default: the model's own."""
    aspect_ratio_bucketing: bool | None = option(None, decided_by="transform", called=("enable_bucket",))
    """Train each picture near its own shape, in a size of at most as many pixels as the square. Default: on, but for
    pixel-space models and --resize_mode squash."""
    min_bucket_reso: int | None = option(None, AT_LEAST_ONE, needs="aspect_ratio_bucketing")
    """Shortest side of such a size. Default: half of the resolution."""
    max_bucket_reso: int | None = option(None, AT_LEAST_ONE, needs="aspect_ratio_bucketing")
    """Longest side. Default: twice the resolution."""
    bucket_reso_steps: int | None = option(
        None, AT_LEAST_ONE, needs="aspect_ratio_bucketing", called=("bucket_resolution_steps",)
    )
    """Sides are multiples of this. Default: 64, below 512 px an eighth of the resolution."""
    bucket_upscale: bool | None = option(None, needs="aspect_ratio_bucketing", called=("bucket_no_upscale",))
    """Enlarge pictures of fewer pixels than their size has; else they are trained in a smaller one."""
    resize_mode: Literal["crop", "squash"] = option("crop", decided_by="transform")
    """crop: scaled to cover its size, which is then cut out. squash: both sides at once, as the tutorial does."""
    center_crop: bool = option(True, decided_by="transform")
    """Crop the centre; with --no-center_crop a random place, drawn once per picture (--live_encoding: per visit)."""
    random_flip: bool = option(False, decided_by="transform", called=("flip_aug",))
    """Mirror half of the visits left to right."""
    background: str = option("white", decided_by="transform")
    """A colour (black, #ff8000): what shows where a picture is transparent."""
    caption_dropout: float | None = option(None, BELOW_ONE, needs="text", called=("caption_dropout_rate",))
    """Share of visits trained with an empty caption. Default: 0.05 where captions vary, else 0."""
    caption_lines: Literal["joined", "chosen"] = option("joined", needs="text", called=("enable_wildcard",))
    """joined: a caption of several lines is one. chosen: each line is one, and each visit takes one of them."""
    shuffle_caption: bool = option(False, needs="text")
    """The parts of a caption between commas come in another order at each visit, which encodes it again."""
    keep_tokens: int | None = option(None, NOT_NEGATIVE, needs="shuffle_caption")
    """So many of these parts, from the first, stay where they are. Default: none."""
    max_token_length: Literal[77, 150, 225] = option(77, needs="text")
    """Longest caption in tokens; 150 and 225 are encoded in chunks of 75."""
    clip_skip: int | None = option(None, AT_LEAST_ONE, needs="text")
    """Take the text encoder's hidden state this many layers from the end (1: the last, as in sd-scripts and A1111)."""
    volume_size: int | None = option(None, NOT_NEGATIVE, decided_by="dataset")
    """Look at so many pictures at a time; 0: at all before the first step. Default: 8192 of more than 32768."""
    max_bad_fraction: float = option(0.01, BELOW_ONE, change="free")
    """Share of the pictures that may be unreadable; these are left out and listed in quarantine.jsonl."""
    image_column: str = option("image", decided_by="dataset")
    """Picture column of a Hugging Face dataset."""
    caption_column: str = option("text", decided_by="dataset")
    """Caption column of a Hugging Face dataset, or of metadata.jsonl, .csv or .parquet beside pictures."""
    follow_links: bool = option(True, change="free")
    """Read files through links that lead out of the folder of --data; with --no_follow_links they are an error."""
    stream_rows: int | None = option(None, AT_LEAST_ONE, decided_by="dataset")
    """Of a dataset on the hub: take this many rows as they come and keep these, instead of downloading all of it."""
    live_encoding: bool = False
    """Send each picture through the VAE at every visit instead of once."""
    encode: Literal["auto", "before", "ahead"] = option("auto", change="free")
    """before: all that the run visits is encoded before its first step. ahead: each picture when the run comes to it.
    auto: before, unless it would take more than a minute. Changes speed only."""
    cache_dir: str | None = option(None, change="free", called=("latents_cache_path", "cache_latents_to_disk"))
    """Folder in which encodings are kept for this and later runs; none: in memory alone. Default: finetune-unet in the
    user's cache folder."""
    cache_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format in which encodings are kept; fp16 takes half of the room (benchmarks/RESULTS.md has its error)."""
    cache_any_environment: bool = option(False, change="free")
    """Also use encodings that another device, number of threads or library version has computed. The last bits of a run
    then depend on what the cache folder holds."""
    cache_strict: bool = option(False, change="free")
    """Hash every picture at the start, also where size, time and inode say that its file is unchanged."""
    dataloader_num_workers: int = option(0, NOT_NEGATIVE, change="free", called=("max_data_loader_n_workers",))
    """Processes that prepare pictures under --live_encoding; kept encodings need none. Changes speed only."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How it learns. A step is one optimizer step."""

    max_train_steps: int | None = option(None, AT_LEAST_ONE, change="length", called=("steps",))
    """Length of the run in optimizer steps."""
    num_train_epochs: int | None = option(
        None, AT_LEAST_ONE, change="length", names=("num_epochs",), called=("epochs", "max_train_epochs")
    )
    """Length of the run in passes over the pictures (max_train_steps wins)."""
    max_train_minutes: float | None = option(None, POSITIVE, change="free")
    """Stop with a checkpoint when the command has run this long, before a cluster's limit ends it: exit code 124. The
    same command goes on."""
    train_batch_size: int | None = option(None, AT_LEAST_ONE, called=("batch_size",))
    """Pictures per device in one forward pass."""
    gradient_accumulation_steps: int | None = option(None, AT_LEAST_ONE)
    """Forward passes of each process per optimizer step. Default: 1 (sdxl: 4)."""
    num_processes: int | None = option(None, AT_LEAST_ONE, change="on resume")
    """Processes whose batches make a step. Default: as many as are launched, and a resume keeps the number it began
    with, however many go on with it."""
    learning_rate: float | None = option(None, POSITIVE, called=("lr", "unet_lr"))
    """Highest learning rate of the schedule."""
    block_learning_rate: tuple[str, ...] | None = option(
        None, needs="an optimizer other than prodigy", called=("block_lr", "down_lr_weight", "up_lr_weight")
    )
    """Factors of the learning rate, by the beginning of layer names: up_blocks=2 mid=0.5."""
    loraplus_lr_ratio: float = option(1.0, POSITIVE, needs="LoRA or DoRA, and an optimizer other than prodigy")
    """LoRA's matrix B learns this many times faster (LoRA+, Hayou et al. 2024); 16 is usual."""
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] | None = None
    """Shape of the learning rate after the warm-up."""
    lr_warmup_steps: int | None = option(None, NOT_NEGATIVE)
    """Optimizer steps over which the learning rate rises from 0. Default: min(100, 5 % of the run)."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "sgd"] = option(
        "adamw", called=("optimizer_type",)
    )
    """Each has a learning rate of its own by default. adamw8bit keeps its moments in 8 bits, and needs the package
    bitsandbytes; prodigy finds its step size, and needs prodigyopt."""
    adam_beta1: float | None = option(None, BELOW_ONE, needs="an optimizer of the Adam family")
    """Decay of AdamW's first moment."""
    adam_beta2: float = option(0.999, BELOW_ONE, needs="an optimizer of the Adam family")
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = option(0.01, NOT_NEGATIVE)
    """Decoupled weight decay."""
    adam_epsilon: float = option(1e-8, POSITIVE, needs="an optimizer of the Adam family")
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, NOT_NEGATIVE)
    """Clip the gradient to this norm; 0 turns clipping off, as fused_backward_pass does."""
    max_bad_steps: int = option(1, AT_LEAST_ONE, change="on resume")
    """So many steps in a row whose loss or gradient is not finite end the run; faults.jsonl says what they were made
    of. No weight changes by them."""
    snr_gamma: float | None = option(None, POSITIVE, called=("min_snr_gamma",))
    """Min-SNR loss weighting (Hang et al. 2023); 5.0 is usual. Default: off."""
    noise_offset: float = option(0.0, NOT_NEGATIVE)
    """Strength of a per-channel constant added to the noise; 0.05 to 0.1 helps very dark and bright pictures."""
    input_perturbation: float = option(0.0, NOT_NEGATIVE)
    """Strength of extra noise on the UNet's input (Ning et al. 2023); 0.1 is usual."""
    use_ema: bool | None = option(None, called=("ema",))
    """Keep an exponential moving average of the weights and export that."""
    ema_inv_gamma: float = option(1.0, POSITIVE, needs="use_ema")
    """EMA decay at step s is 1 - (1 + s / inv_gamma) ** -power, at most ema_max_decay."""
    ema_power: float = option(0.75, POSITIVE, needs="use_ema")
    """See ema_inv_gamma."""
    ema_max_decay: float = option(0.9999, BELOW_ONE, needs="use_ema")
    """See ema_inv_gamma."""
    deterministic: bool = option(False, change="on resume")
    """On a GPU: only algorithms that give the same bits every time, which are slower. A CPU always does."""
    seed: int = option(0, NOT_NEGATIVE)
    """The run is a function of this number: order, noise, timesteps, crops, flips, initial weights."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Whether it learns what the pictures have in common: the loss on pictures that it is not trained on."""

    validation_fraction: float | None = option(None, BELOW_ONE, needs="validation_data left out")
    """Share of the pictures that is held out, near duplicates on one side; 0: none. Default: a tenth, at most 200
    pictures, and none of fewer than 20."""
    validation_data: str | None = option(None, called=("validation_data_dir", "val_data"), path=True)
    """Hold out these pictures instead, which lie elsewhere; as --data."""
    validate_every: int | None = option(None, AT_LEAST_ONE, change="on resume")
    """Steps between validations, beside the first and the last. Default: what 5 % of the time allows, and with
    --early_stop a twentieth of the run."""
    early_stop: bool = option(False, change="on resume")
    """End when the validation loss has risen for two validations, by more than chance; export what had the least."""
    forgetting_prompts: int | None = option(None, NOT_NEGATIVE, needs="a model that takes text", change="on resume")
    """Watch how far this many prompts of everyday things, of the 64 there are, come to mean something else; 0: none.
    Default: what 2 % of the time allows."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Pictures drawn while training."""

    sample_prompts: tuple[str, ...] | None = option(
        None, needs="text", change="on resume", names=("validation_prompts",), called=("validation_prompt",), path=True
    )
    """Prompts of the sample grids, or a file with one a line (sd-scripts' --n --s --l --d at its end hold).
    Default: a training caption, the subject in a new place, the class alone."""
    sample_every: int | None = option(
        None, NOT_NEGATIVE, change="on resume", names=("validation_steps",), called=("sample_every_n_steps",)
    )
    """Draw a grid every this many steps, beside the first and last; 0: none. Default: what 5 % of the run allows."""
    save_image_epochs: int | None = option(
        None, AT_LEAST_ONE, needs="sample_every left out", change="on resume", called=("sample_every_n_epochs",)
    )
    """Draw a grid every this many epochs."""
    eval_batch_size: int | None = option(None, AT_LEAST_ONE, change="on resume")
    """Pictures per prompt in a grid."""
    num_inference_steps: int | None = option(
        None, NOT_NEGATIVE, change="on resume", called=("ddpm_num_inference_steps",)
    )
    """Sampler steps per picture; 0 turns sampling off."""
    guidance_scale: float | None = option(None, NOT_NEGATIVE, needs="a model that takes text", change="on resume")
    """Classifier-free guidance of the grids; 1 is none. Default: the model's own (sd15: 7.5, sdxl: 5, tiny: 3)."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written, and where."""

    output_dir: str | None = option(None, change="free", called=("output",))
    """Run folder. Default: runs/<data>-<model>; the same command resumes it, another config takes a new number."""
    lock_output_dir: bool = option(True, change="free")
    """Let no second run into the folder. --no_lock_output_dir is for file systems that cannot lock files."""
    overwrite_output_dir: bool = option(False, change="free")
    """Delete what an earlier run left in output_dir."""
    resume_from_checkpoint: str | None = option(None, change="free", called=("resume",))
    """"latest" or the path of a checkpoint folder."""
    allow_changed: tuple[str, ...] = option((), change="free")
    """Options that may differ from those of the run that is resumed ("data", "model": also what lies there). From
    there on it is the run that they make."""
    checkpointing_steps: int = option(
        500, NOT_NEGATIVE, change="on resume", called=("save_every_n_steps", "save_steps")
    )
    """Write a resumable checkpoint every this many steps (and at the end); 0: only at the end."""
    checkpointing_minutes: float | None = option(None, POSITIVE, change="on resume")
    """Write a checkpoint when the last is this many minutes old, beside checkpointing_steps. SIGUSR1 asks for one, too.
    """
    save_model_epochs: int | None = option(None, AT_LEAST_ONE, change="on resume", called=("save_every_n_epochs",))
    """Write a checkpoint every this many epochs, beside checkpointing_steps."""
    checkpoints_total_limit: int = option(2, NOT_NEGATIVE, change="on resume", called=("save_last_n_steps_state",))
    """How many checkpoints to keep; 0 keeps all."""
    export_formats: tuple[Literal["single-file", "diffusers", "unet"], ...] = option(
        (), change="free", inherited=True, called=("output_model_format",)
    )
    """At the end, also write the model in these forms, a LoRA merged into it, to exports/ of the run folder."""
    export_precision: Literal["fp32", "fp16", "bf16"] = option(
        "fp16", change="free", inherited=True, called=("output_dtype",)
    )
    """Number format of export_formats; a LoRA's own files are fp32."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), change="free", inherited=True, called=("log_with",)
    )
    """Trackers that get the metrics, beside metrics.jsonl."""
    tracker_project_name: str | None = option(
        None, needs="report_to", change="free", inherited=True, called=("log_tracker_name", "wandb_project")
    )
    """Project of the trackers. Default: WANDB_PROJECT of the environment, else finetune-unet."""
    push_to_hub: bool = option(False, change="free")
    """Upload the result and a model card to the Hugging Face hub."""
    hub_model_id: str | None = option(None, needs="push_to_hub", change="free")
    """Repository to push to. Default: one of the run folder's name under your account, if it is new."""
    hub_private_repo: bool | None = option(None, needs="push_to_hub", change="free")
    """Create the repository as private. Default: yes; --no_hub_private_repo publishes it."""


ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The layers that a LoRA adapts unless the model's family says otherwise."""

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
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

"""TrainConfig: every option of a run, written once, with its type, default and meaning. Never imports torch.

The sections are dataclasses of their own, so that `--help` and the TOML file group them; `TrainConfig` is all of
them together, flat, so that `TrainConfig(model="sd15", data="./images", resolution=512)` works. Options whose
default depends on the model family are None until the run resolves them (`finetune/plan.py`).
"""

import dataclasses
import difflib
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tomli_w

from finetune.errors import UsageError

TUTORIAL_NAMES = {
    "image_size": "resolution",
    "num_epochs": "num_train_epochs",
    "validation_prompts": "sample_prompts",
    "validation_steps": "sample_every",
    "pretrained_model_name_or_path": "model",
    "train_data_dir": "data",
    "instance_data_dir": "data",
    "instance_prompt": "prompt",
}
"""Names that users bring from the Hugging Face tutorial and scripts -> our option."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What learns."""

    model: str = "tiny"
    """sd15, sd21, ddpm, tiny, a hub id (owner/name), or a local diffusers folder."""
    method: Literal["lora", "full"] | None = None
    """lora: train a small adapter (default for latent models). full: every weight of the UNet (default for ddpm)."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. Default: as the model's scheduler config says."""
    rank: int = 16
    """LoRA rank."""
    lora_alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / rank. Default: equal to rank."""
    lora_dropout: float = 0.0
    """Dropout inside the LoRA layers, in [0, 1)."""
    lora_target_modules: tuple[str, ...] | None = None
    """Layer names (their endings) that get an adapter. Default: attention and feed-forward."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 where the hardware multiplies it natively (CPUs included), else no."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Pictures and captions."""

    data: str = ""
    """A folder of pictures, a folder of parquet/arrow files, or a Hugging Face dataset id."""
    prompt: str | None = None
    """Caption for every picture that has none of its own."""
    trigger: str | None = None
    """A word placed before every caption, or where the caption says [trigger]."""
    resolution: int | None = None
    """Pixels per side. Default: the model's own."""
    resize_mode: Literal["crop", "squash"] = "crop"
    """crop: shorter side to the resolution, then a square crop. squash: both sides at once, as the tutorial does."""
    center_crop: bool = True
    """Crop the centre; with --no-center_crop a random place, drawn once per picture (--live_encoding: per visit)."""
    random_flip: bool = False
    """Mirror half of the visits left to right."""
    caption_dropout: float | None = None
    """Share of visits trained with an empty caption. Default: 0.05 where captions vary, else 0."""
    max_token_length: Literal[77, 150, 225] = 77
    """Longest caption in tokens; 150 and 225 are encoded in chunks of 75."""
    clip_skip: int | None = None
    """Take the text encoder's hidden state this many layers from the end (1: the last, as in sd-scripts and A1111)."""
    image_column: str = "image"
    """Picture column of a Hugging Face dataset."""
    caption_column: str = "text"
    """Caption column of a Hugging Face dataset."""
    live_encoding: bool = False
    """Send each picture through the VAE at every visit instead of once per run."""
    dataloader_num_workers: int = 0
    """Processes that prepare pictures. Changes speed only."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How it learns. A step is one optimizer step."""

    max_train_steps: int | None = None
    """Length of the run in optimizer steps."""
    num_train_epochs: int | None = None
    """Length of the run in passes over the pictures (max_train_steps wins)."""
    train_batch_size: int | None = None
    """Pictures per device in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float | None = None
    """Highest learning rate of the schedule."""
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] | None = None
    """Shape of the learning rate after the warm-up."""
    lr_warmup_steps: int | None = None
    """Optimizer steps over which the learning rate rises from 0. Default: min(100, 5 % of the run)."""
    optimizer: Literal["adamw", "adafactor", "prodigy", "sgd"] = "adamw"
    """prodigy finds its own step size: it needs the package prodigyopt and --learning_rate 1."""
    adam_beta1: float | None = None
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.999
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 0.01
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 turns clipping off."""
    snr_gamma: float | None = None
    """Min-SNR loss weighting (Hang et al. 2023); 5.0 is usual. Default: off."""
    noise_offset: float = 0.0
    """Strength of a per-channel constant added to the noise; 0.05 to 0.1 helps very dark and bright pictures."""
    input_perturbation: float = 0.0
    """Strength of extra noise on the UNet's input (Ning et al. 2023); 0.1 is usual."""
    use_ema: bool | None = None
    """Keep an exponential moving average of the weights and export that."""
    ema_inv_gamma: float = 1.0
    """EMA decay at step s is 1 - (1 + s / inv_gamma) ** -power, at most ema_max_decay."""
    ema_power: float = 0.75
    """See ema_inv_gamma."""
    ema_max_decay: float = 0.9999
    """See ema_inv_gamma."""
    seed: int = 0
    """The run is a function of this number: order, noise, timesteps, crops, flips, initial weights."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Pictures drawn while training."""

    sample_prompts: tuple[str, ...] | None = None
    """Prompts of the sample grids. Default: a training caption, the subject in a new place, the class alone."""
    sample_every: int | None = None
    """Draw a grid every this many steps, beside the first and last; 0: none. Default: what 5 % of the run allows."""
    save_image_epochs: int | None = None
    """Draw a grid every this many epochs."""
    eval_batch_size: int | None = None
    """Pictures per prompt in a grid."""
    num_inference_steps: int | None = None
    """Sampler steps per picture; 0 turns sampling off."""
    guidance_scale: float = 7.5
    """Classifier-free guidance of the grids; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written, and where."""

    output_dir: str | None = None
    """Run folder. Default: runs/<data>-<model>; the same command resumes it, another config takes a new number."""
    overwrite_output_dir: bool = False
    """Delete what an earlier run left in output_dir."""
    resume_from_checkpoint: str | None = None
    """"latest" or the path of a checkpoint folder."""
    checkpointing_steps: int = 500
    """Write a resumable checkpoint every this many steps (and at the end); 0: only at the end."""
    save_model_epochs: int | None = None
    """Write a checkpoint every this many epochs, beside checkpointing_steps."""
    checkpoints_total_limit: int = 2
    """How many checkpoints to keep; 0 keeps all."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the metrics, beside metrics.jsonl."""
    push_to_hub: bool = False
    """Upload the result and a model card to the Hugging Face hub."""
    hub_model_id: str | None = None
    """Repository to push to. Default: the run folder's name under your account."""
    hub_private_repo: bool | None = None
    """Create the repository as private."""


SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "samples": SampleOptions,
    "output": OutputOptions,
}


@dataclass(frozen=True, kw_only=True, init=False)
class TrainConfig(OutputOptions, SampleOptions, TrainingOptions, DataOptions, ModelOptions):
    """All options of a run, flat and checked. Also takes the tutorial's names (`image_size`, `num_epochs`).

    Raises:
        UsageError: unknown option, wrong type, or a value out of range.
    """

    def __init__(self, **options: Any) -> None:
        given = {name: checked(name, value) for name, value in _canonical(options).items()}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        self.__dict__.update(defaults | given, given=frozenset(given))  # past the frozen `__setattr__`
        _check_ranges(self)

    given: typing.ClassVar[frozenset[str]]
    """Names of the options that were given (of each instance; no option itself): a resumed run inherits the others."""

    @property
    def image_size(self) -> int | None:
        return self.resolution

    @property
    def num_epochs(self) -> int | None:
        return self.num_train_epochs


@cache
def option_types() -> dict[str, Any]:
    """Option name -> its type hint, in the order of the sections."""
    hints: dict[str, Any] = {}
    for section in SECTIONS.values():
        hints |= typing.get_type_hints(section)
    return hints


OTHER_NAMES = {
    "lr": "learning_rate",
    "steps": "max_train_steps",
    "epochs": "num_train_epochs",
    "batch_size": "train_batch_size",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "caption": "prompt",
    "output": "output_dir",
}
"""What other tools call an option that has another name here: suggested, not accepted."""


def suggest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean X?' when something known is near, else an empty string."""
    known, bare = list(known), word.lstrip("-")
    if (ours := word.replace(bare, OTHER_NAMES.get(bare, bare))) in known:
        return f"; did you mean {ours}?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under our own names. Raises UsageError for an unknown or doubled one."""
    result: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for given, value in options.items():
        name = TUTORIAL_NAMES.get(given, given)
        if name not in option_types():
            raise UsageError(f"unknown option {given!r}{suggest(given, [*option_types(), *TUTORIAL_NAMES])}")
        if name in result:
            raise UsageError(f"{spelled[name]} and {given} are one option: give one of them")
        result[name] = value
        spelled[name] = given
    return result


def checked(name: str, value: Any) -> Any:
    """`value` as the option's type wants it (a list becomes a tuple). Raises UsageError naming what is allowed."""
    try:
        return fitted(option_types()[name], value)
    except ValueError as error:
        raise UsageError(f"{name} = {value!r}: {error}") from error


def fitted(hint: Any, value: Any) -> Any:
    """`value` as the type hint wants it: a list becomes a tuple, a whole number a float, a path text.

    Raises:
        ValueError: the value is of another type; the message says what is allowed and suggests the nearest choice.
    """
    for kind in alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is types.NoneType and value is None:
            return None
        if origin is Literal and any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(fitted(arguments[0], item) for item in value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and number and abs(value) <= sys.float_info.max:  # so neither inf nor nan
            return float(value)
        if kind is str and isinstance(value, Path):
            return str(value)
        if kind in (bool, int, str) and type(value) is kind:
            return value
    raise ValueError(f"allowed is {readable(hint)}{_suggest_value(hint, value)}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of `A | B`; the hint itself otherwise."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def readable(hint: Any) -> str:
    """What a value of this type is, in words."""
    if len(alternatives(hint)) > 1:
        return " or ".join(readable(kind) for kind in alternatives(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of: {readable(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _suggest_value(hint: Any, value: Any) -> str:
    kinds = [kind for kind in alternatives(hint) if typing.get_origin(kind) is Literal]
    return suggest(str(value), [str(choice) for kind in kinds for choice in typing.get_args(kind)])


_AT_LEAST_ONE = ("rank", "resolution", "clip_skip", "max_train_steps", "num_train_epochs", "train_batch_size")
_AT_LEAST_ONE += ("gradient_accumulation_steps", "save_image_epochs", "save_model_epochs", "eval_batch_size")
_POSITIVE = ("lora_alpha", "learning_rate", "snr_gamma", "ema_inv_gamma", "ema_power", "adam_epsilon")
_NOT_NEGATIVE = ("dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "noise_offset")
_NOT_NEGATIVE += ("input_perturbation", "sample_every", "num_inference_steps", "checkpointing_steps")
_NOT_NEGATIVE += ("checkpoints_total_limit", "guidance_scale", "seed")
_BELOW_ONE = ("lora_dropout", "caption_dropout", "adam_beta1", "adam_beta2", "ema_max_decay")


def _check_ranges(config: TrainConfig) -> None:
    rules: tuple[tuple[tuple[str, ...], str, typing.Callable[[float], bool]], ...] = (
        (_AT_LEAST_ONE, "1 or more", lambda value: value >= 1),
        (_POSITIVE, "above 0", lambda value: 0 < value < float("inf")),
        (_NOT_NEGATIVE, "0 or more", lambda value: 0 <= value < float("inf")),
        (_BELOW_ONE, "from 0 up to (not including) 1", lambda value: 0 <= value < 1),
    )
    for names, allowed, holds in rules:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise UsageError(f"{name} = {value}: allowed is {allowed}")


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Option name -> value, flat, in the order of the sections."""
    return {name: getattr(config, name) for name in option_types()}


def replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    """A copy with some options changed, checked again. What was given stays given, and what is changed is not."""
    changed = TrainConfig(**(as_dict(config) | changes))
    changed.__dict__["given"] = config.given
    return changed


def config_text(config: TrainConfig) -> str:
    """The config as TOML with a table per section; options that are None are left out."""
    tables = {
        section: {
            field.name: value
            for field in dataclasses.fields(kind)
            if (value := getattr(config, field.name)) is not None
        }
        for section, kind in SECTIONS.items()
    }
    return tomli_w.dumps(tables)


def read_options(path: Path) -> dict[str, Any]:
    """The options in a TOML file, by our own names. Tables (`[training]` ...) are for the eye and may be left out.

    Raises:
        UsageError: the file is missing, is no TOML, or names an unknown section or option, or one twice.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and name not in SECTIONS:
            raise UsageError(f"config file {path}: unknown section [{name}]{suggest(name, SECTIONS)}")
        entries = value if isinstance(value, dict) else {name: value}
        if twice := flat.keys() & entries.keys():
            raise UsageError(f"config file {path}: {min(twice)} is given twice")
        flat |= entries
    try:
        return {name: checked(name, value) for name, value in _canonical(flat).items()}
    except UsageError as error:
        raise UsageError(f"config file {path}: {error}") from error


def load_config(path: str | Path) -> TrainConfig:
    """The TrainConfig in a TOML file. Raises UsageError as `read_options` does."""
    return TrainConfig(**read_options(Path(path)))

"""TrainConfig: the options of a run, flat and validated, and their TOML form. Never imports torch.

What was given and what was derived are told apart: a `TrainConfig` remembers the names of the options that were
given, a `ResolvedConfig` has a value for every option that the given ones leave open, and config.toml keeps both.
"""

import copy
import dataclasses
import difflib
import importlib.metadata
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from finetune.errors import UsageError
from finetune.option_info import alternatives
from finetune.options import ATTENTION_AND_FEED_FORWARD, SECTIONS, option_info, option_types
from finetune.options.adapter import AdapterOptions
from finetune.options.captions import CaptionOptions
from finetune.options.data import DataOptions
from finetune.options.evaluation import SampleOptions, ValidationOptions
from finetune.options.model import ModelOptions
from finetune.options.objective import ObjectiveOptions
from finetune.options.output import OutputOptions
from finetune.options.training import TrainingOptions

RECORD = "finetune"
"""The table of config.toml with the version that wrote it."""

DERIVED = "derived"
"""The table of config.toml with what the run decided by itself."""

_FROZEN = "the text encoder stays frozen here"
_ONCE = "every image and caption is encoded once anyway, and kept in --cache_dir"
_ATTENTION = "torch's own fast attention is used anyway"
ELSEWHERE = {
    **dict.fromkeys(
        ("train_text_encoder", "text_encoder_lr", "learning_rate_te", "stop_text_encoder_training"), _FROZEN
    ),
    "network_train_unet_only": "only the UNet is trained anyway",
    **dict.fromkeys(("cache_latents", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"), _ONCE),
    **dict.fromkeys(("xformers", "sdpa", "mem_eff_attn", "enable_xformers_memory_efficient_attention"), _ATTENTION),
    "save_model_as": "exports are safetensors",
    "save_precision": "a LoRA is exported in fp32; finetune-unet export --precision writes others",
    "save_state": "every checkpoint can be resumed",
    "logging_dir": "trackers write into logs/ of the run folder",
    "output_name": "the export lies in --output_dir under the name that diffusers looks for",
    "scale_lr": "the learning rate is taken as it is given",
    "use_8bit_adam": "give --optimizer adamw8bit",
    "fused_back_pass": "give --full_bf16 --fused_backward_pass",
    "with_prior_preservation": "class images are learned wherever --class_data names some",
    "dataset_config": "give the file as --data",
    "revision": "the newest version is taken; give the folder of a download of another one",
    "hub_token": "log in with hf auth login, or set HF_TOKEN",
}
"""What other tools have and this one has not -> why, in the words of an error."""


@dataclass(frozen=True, kw_only=True, init=False)
class TrainConfig(
    OutputOptions,
    SampleOptions,
    ValidationOptions,
    ObjectiveOptions,
    TrainingOptions,
    CaptionOptions,
    DataOptions,
    AdapterOptions,
    ModelOptions,
):
    """All options of a run, flat and checked. Also takes the tutorial's names (`image_size`, `num_epochs`).

    Raises:
        UsageError: unknown option, wrong type, or a value out of range.
    """

    def __init__(self, **options: Any) -> None:
        canonical = _with_each_resolution(_canonical(options))
        given = {name: checked(name, value) for name, value in canonical.items()}
        _freeze(self, {field.name: field.default for field in dataclasses.fields(TrainConfig)} | given, given)

    given: typing.ClassVar[frozenset[str]]
    """Names of the options that were given (of each instance; no option itself): all others may be derived."""

    @property
    def image_size(self) -> int | None:
        return self.resolution

    @property
    def num_epochs(self) -> int | None:
        return self.num_train_epochs


class ResolvedConfig(TrainConfig):
    """A config with nothing left open: what was given, and what the run decided by itself.

    Args:
        config: what was given.
        derived: option -> value, for all of the options below that `config` leaves open.
    """

    method: Literal["lora", "full"]
    lora_alpha: float
    lora_target_modules: tuple[str, ...]
    mixed_precision: Literal["no", "fp16", "bf16"]
    compile: bool
    resolution: int
    aspect_ratio_bucketing: bool
    caption_dropout: float
    max_train_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    validation_fraction: float
    adam_beta1: float
    max_grad_norm: float
    use_ema: bool
    eval_batch_size: int
    num_inference_steps: int
    guidance_scale: float

    def __init__(self, config: TrainConfig, **derived: Any) -> None:
        _freeze(self, as_dict(config) | {name: checked(name, value) for name, value in derived.items()}, config.given)
        if undecided := [name for name in ResolvedConfig.__annotations__ if getattr(self, name) in (None, "auto")]:
            raise UsageError(f"{', '.join(undecided)}: left open")

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_processes


def _freeze(config: TrainConfig, values: Mapping[str, Any], given: typing.Iterable[str]) -> None:
    """Write the values past the frozen `__setattr__`. Raises UsageError for one out of its range."""
    config.__dict__.update(values, given=frozenset(given))
    for name, info in option_info().items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if info.range is not None and not all(map(info.range.holds, numbers)):
            raise UsageError(f"{name} = {value}: expected {info.range.allowed}")


def suggest(word: str, names: typing.Iterable[str]) -> str:
    """'; did you mean X?' when something known is near, or is what we call it, or why there is none; or nothing."""
    names, bare = list(names), word.lstrip("-")
    if bare in ELSEWHERE:
        return f"; {ELSEWHERE[bare]}"
    ours = next((name for name, info in option_info().items() if bare in info.suggest_for), bare)
    if (ours := word.replace(bare, ours)) in names:
        return f"; did you mean {ours}?"
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def accepted_names() -> dict[str, str]:
    """Every name under which an option may be given -> the option."""
    others = {other: name for name, info in option_info().items() for other in info.aliases}
    return {name: name for name in option_types()} | others


def _canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under our own names. Raises UsageError for an unknown or doubled one."""
    result: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    names = accepted_names()
    for given, value in options.items():
        name = names.get(given)
        if name is None:
            raise UsageError(f"unknown option {given!r}{suggest(given, names)}")
        if name in result:
            raise UsageError(f"{spelled[name]} and {given} are one option: give one of them")
        result[name] = value
        spelled[name] = given
    return result


def _with_each_resolution(options: dict[str, Any]) -> dict[str, Any]:
    """The options with each source of images at each of several resolutions, unless it has a resolution of its own."""
    sides = options.get("resolution")
    if not isinstance(sides, list | tuple):
        return options
    if not sides or len(sides) == 1:
        return options | {"resolution": sides[0] if sides else None}
    data = checked("data", options.get("data", ()))
    if not data:
        raise UsageError(f"resolution = {list(sides)}: several resolutions are for --data; give one")
    repeats = checked("repeats", options.get("repeats", ())) or (1,) * len(data)
    settings = checked("source_settings", options.get("source_settings", ())) or ("",) * len(data)
    sources: list[tuple[str, int, str]] = []
    if not len(data) == len(repeats) == len(settings):
        raise UsageError(f"{len(repeats)} repeats and {len(settings)} source_settings for {len(data)} --data")
    for source, times, text in zip(data, repeats, settings, strict=True):
        of_each = [f"{text}{', ' * bool(text)}resolution = {checked('resolution', side)}" for side in sides]
        sources += [(source, times, each) for each in ([text] if re.search(r"\bresolution\s*=", text) else of_each)]
    names = ("data", "repeats", "source_settings")
    return options | dict(zip(names, zip(*sources, strict=True), strict=True)) | {"resolution": max(sides)}


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
        if origin is tuple and (isinstance(value, (list, tuple)) or type(value) in (str, int)):
            items = value if isinstance(value, (list, tuple)) else [value]  # one is a list of one
            return tuple(fitted(arguments[0], item) for item in items)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and number and abs(value) <= sys.float_info.max:  # so neither inf nor nan
            return float(value)
        if kind is str and (isinstance(value, Path) or type(value) is str):
            return _text(str(value))
        if kind in (bool, int) and type(value) is kind:
            return value
    choices = all(typing.get_origin(kind) is Literal for kind in alternatives(hint) if kind is not types.NoneType)
    words = "choose one of" if choices else "expected"
    raise ValueError(f"{words} {readable(hint)}{_suggest_value(hint, value)}")


def _text(value: str) -> str:
    """The value, if a config.toml can hold it: Python reads other bytes of a command line as lone surrogates."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("expected text in UTF-8; a file or folder of another name must be renamed") from error
    return value


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


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Option name -> value, flat, in the order of the sections."""
    return {name: getattr(config, name) for name in option_types()}


Config = typing.TypeVar("Config", bound=TrainConfig)


def replace(config: Config, given: frozenset[str] | None = None, /, **changes: Any) -> Config:
    """A copy with some options changed, checked again. What was given stays given, unless `given` says otherwise."""
    changed = copy.copy(config)
    new = {name: checked(name, value) for name, value in _canonical(changes).items()}
    _freeze(changed, as_dict(config) | new, config.given if given is None else given)
    return changed


def as_settings(config: TrainConfig) -> dict[str, Any]:
    """Options that differ from their defaults, for people: model cards and trackers."""
    return {f.name: v for f in dataclasses.fields(TrainConfig) if (v := getattr(config, f.name)) != f.default}


def config_text(config: TrainConfig) -> str:
    """The config as TOML: a table per section with the options that were given, then what the run decided itself."""
    values = {name: value for name, value in as_dict(config).items() if value is not None}
    tables = {
        section: {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values.keys() & config.given}
        for section, kind in SECTIONS.items()
    }
    text = tomli_w.dumps(tables)
    if isinstance(config, ResolvedConfig):
        text += "\n" + tomli_w.dumps({RECORD: {"version": own_version()}})
        derived = {name: value for name, value in values.items() if name not in config.given}
        text += "\n# What the options above left open, as this run decided it; --config decides it anew.\n"
        text += tomli_w.dumps({DERIVED: derived})
    return text


def read_options(path: Path) -> dict[str, Any]:
    """The options given in a TOML file, by our own names. Tables (`[training]` ...) are for the eye, and optional.

    Raises:
        UsageError: the file is missing, is no TOML, or names an unknown section or option, or one twice.
    """
    return _read(path)[0]


def load_config(path: str | Path) -> TrainConfig:
    """The TrainConfig in a TOML file: what was given. Raises UsageError as `read_options` does."""
    return TrainConfig(**read_options(Path(path)))


def own_version() -> str:
    """The version of finetune-unet, as it is installed."""
    return importlib.metadata.version("finetune-unet")


def decided_otherwise(path: Path, config: ResolvedConfig) -> str:
    """What a run that repeats a recorded config decides otherwise than that run did; "" for nothing.

    Args:
        path: the config.toml, of a run; another file records no decisions.
        config: of the run that repeats it.

    Raises:
        UsageError: as `read_options`.
    """
    tables = _tables(path)
    then = tables.get(RECORD, {}).get("version", "0.1.0")
    names = accepted_names()
    derived = {names[name]: value for name, value in tables.get(DERIVED, {}).items() if name in names}
    now = {name: list(v) if isinstance(v, tuple) else v for name, v in as_dict(config).items()}
    changed = [
        f"{name} {value} -> {now[name]}"
        for name, value in derived.items()
        if name not in config.given and now[name] != value and name not in ("output_dir", "data")
    ]
    return f"decided otherwise than by the run of {path} (version {then}): {', '.join(changed)}" if changed else ""


def load_resolved(path: Path) -> ResolvedConfig:
    """The config that a run recorded, with what it had decided itself. Raises UsageError as `read_options` does."""
    given, derived = _read(path)
    try:
        config = TrainConfig(**given)
        if not derived:  # written by version 0.1.0, as if all were given, but for what it decided in the end
            targets = config.lora_target_modules or ATTENTION_AND_FEED_FORWARD
            derived = {"lora_target_modules": targets, "lora_alpha": config.lora_alpha or float(config.rank)}
        later = {"aspect_ratio_bucketing": False, "compile": False, "num_processes": 1, "validation_fraction": 0.0}
        for name, value in later.items():  # versions without these wrote nothing of them
            if getattr(config, name) is None:
                derived.setdefault(name, value)
        return ResolvedConfig(config, **derived)
    except UsageError as error:
        raise UsageError(f"config file {path}: {error}") from error


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} is not valid TOML: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options in a file that were given, and those that were derived."""
    tables = _tables(path)
    derived = tables.pop(DERIVED, {})
    tables.pop(RECORD, None)
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict) and name not in SECTIONS:
            raise UsageError(f"config file {path}: unknown section [{name}]{suggest(name, SECTIONS)}")
        entries = value if isinstance(value, dict) else {name: value}
        if twice := flat.keys() & entries.keys():
            raise UsageError(f"config file {path}: {min(twice)} is given twice")
        flat |= entries
    try:
        given, decided = ({n: checked(n, v) for n, v in _canonical(some).items()} for some in (flat, derived))
        return given, decided
    except UsageError as error:
        raise UsageError(f"config file {path}: {error}") from error


def numbers_by_block(option: str, given: Iterable[str], names: Iterable[str]) -> dict[str, float]:
    """ "up_blocks.1=8" ... -> beginning of a layer's name -> number. Raises UsageError for what is otherwise."""
    numbers: dict[str, float] = {}
    for text in given:
        begin, _, number = text.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", number):
            raise UsageError(f"{option} {text}: expected BLOCK=NUMBER, such as up_blocks.1=2")
        if not any(name.startswith(begin) for name in names):
            blocks = sorted({".".join(name.split(".")[: 2 if name[:2] in ("do", "up") else 1]) for name in names})
            raise UsageError(f"{option} {text}: no layer begins like that; the UNet's blocks: {', '.join(blocks)}")
        numbers[begin] = float(number)
    return numbers

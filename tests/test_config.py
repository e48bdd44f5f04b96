"""TrainConfig: defaults, names, checks that answer in one line, and the way to TOML and back."""

import dataclasses
import importlib.metadata
import math
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cli import parse_train
from finetune.config import (
    ResolvedConfig,
    TrainConfig,
    alternatives,
    as_dict,
    config_text,
    decided_otherwise,
    fitted,
    load_config,
    load_resolved,
    read_options,
    readable,
    replace,
)
from finetune.errors import UsageError
from finetune.options import SECTIONS, option_info, option_types


def complaint(**options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**options)
    return str(caught.value)


def complaint_about_file(folder: Path, text: str) -> str:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_options(file)
    message = str(caught.value)
    assert message.startswith(f"config file {file}")
    return message.removeprefix(f"config file {file}").removeprefix(": ")


def test_every_option_of_the_sections_is_in_the_config_and_only_those() -> None:
    of_sections = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert list(option_types()) == of_sections
    assert sorted(of_sections) == sorted(field.name for field in dataclasses.fields(TrainConfig))


def test_defaults_are_those_of_the_sections() -> None:
    defaults = {field.name: field.default for kind in SECTIONS.values() for field in dataclasses.fields(kind)}
    assert as_dict(TrainConfig()) == defaults


def test_options_are_kept() -> None:
    config = TrainConfig(model="sd15", data="./images", resolution=512, sample_prompts=["a", "b"], learning_rate=1)
    assert (config.model, config.data, config.resolution) == ("sd15", ("./images",), 512)
    assert config.sample_prompts == ("a", "b")
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)


def test_config_is_frozen_hashable_and_comparable() -> None:
    config = TrainConfig(rank=4, sample_prompts=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8
    assert config == TrainConfig(rank=4, sample_prompts=("a",))
    assert hash(config) == hash(replace(config, rank=4))


def test_replace_changes_and_checks() -> None:
    config = TrainConfig(rank=4)
    assert replace(config, rank=8, seed=1) == TrainConfig(rank=8, seed=1)
    with pytest.raises(UsageError, match="rank = 0: expected 1 or more"):
        replace(config, rank=0)


def test_names_of_the_tutorial_and_the_scripts() -> None:
    config = TrainConfig(image_size=128, num_epochs=50, validation_prompts=["a"], validation_steps=10)
    assert (config.resolution, config.num_train_epochs) == (128, 50)
    assert (config.image_size, config.num_epochs) == (128, 50)
    assert (config.sample_prompts, config.sample_every) == (("a",), 10)


@pytest.mark.parametrize("names", [("image_size", "resolution"), ("resolution", "image_size")])
def test_both_names_of_one_option(names: tuple[str, str]) -> None:
    assert complaint(**dict.fromkeys(names, 64)) == f"{names[0]} and {names[1]} are one option: give one of them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leraning_rate": 1e-4}, "unknown option 'leraning_rate'; did you mean learning_rate?"),
        ({"learning-rate": 1e-4}, "unknown option 'learning-rate'; did you mean learning_rate?"),
        ({"image_sise": 64}, "unknown option 'image_sise'; did you mean image_size?"),
        ({"xyzzy": 1}, "unknown option 'xyzzy'"),
        ({"method": "loar"}, "method = 'loar': choose one of lora, full; did you mean lora?"),
        ({"method": 3}, "method = 3: choose one of lora, full"),
        ({"mixed_precision": None}, "mixed_precision = None: choose one of auto, no, fp16, bf16"),
        ({"rank": "many"}, "rank = 'many': expected a whole number"),
        ({"rank": 4.0}, "rank = 4.0: expected a whole number"),
        ({"rank": True}, "rank = True: expected a whole number"),
        ({"rank": None}, "rank = None: expected a whole number"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast': expected a number"),
        ({"learning_rate": False}, "learning_rate = False: expected a number"),
        ({"center_crop": "yes"}, "center_crop = 'yes': expected true or false"),
        ({"use_ema": 1}, "use_ema = 1: expected true or false"),
        ({"prompt": 7}, "prompt = 7: expected text"),
        (
            {"prompt": "caf\udce9"},  # as Python reads the Latin-1 of a terminal
            "prompt = 'caf\\udce9': expected text in UTF-8; a file or folder of another name must be renamed",
        ),
        ({"max_token_length": 78}, "max_token_length = 78: choose one of 77, 150, 225"),
        ({"max_token_length": 77.0}, "max_token_length = 77.0: choose one of 77, 150, 225; did you mean 77?"),
        ({"sample_prompts": 1.5}, "sample_prompts = 1.5: expected a list of: text"),
        (
            {"report_to": ["tensorbord"]},
            "report_to = ['tensorbord']: choose one of tensorboard, wandb, trackio; did you mean tensorboard?",
        ),
    ],
)
def test_what_is_unknown_or_of_the_wrong_type(options: dict[str, Any], message: str) -> None:
    assert complaint(**options) == message


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("rank", 0, "1 or more"),
        ("max_train_steps", 0, "1 or more"),
        ("learning_rate", 0.0, "above 0"),
        ("snr_gamma", -1.0, "above 0"),
        ("noise_offset", -0.1, "0 or more"),
        ("checkpointing_steps", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("lora_dropout", 1.0, "from 0 up to (not including) 1"),
        ("caption_dropout", -0.1, "from 0 up to (not including) 1"),
    ],
)
def test_out_of_range(option: str, value: float, allowed: str) -> None:
    assert complaint(**{option: value}) == f"{option} = {value}: expected {allowed}"


@pytest.mark.parametrize("option", [name for name, hint in option_types().items() if hint in (int, int | None)])
def test_no_whole_number_may_be_negative(option: str) -> None:
    assert "expected" in complaint(**{option: -1})


@pytest.mark.parametrize("option", [name for name, hint in option_types().items() if hint in (float, float | None)])
@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400])
def test_numbers_are_finite(option: str, value: float) -> None:
    assert complaint(**{option: value}).endswith("expected a number")


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type, in the range that all options share."""
    if len(alternatives(hint)) > 1:
        return st.one_of(*map(values, alternatives(hint)))
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), min_size=1, max_size=3).map(tuple)
    texts = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda text: text != "None")
    numbers = st.floats(0, 1, exclude_min=True, exclude_max=True)
    return {
        bool: st.booleans(),
        int: st.integers(1, 10**9),
        float: numbers,
        str: texts,
        types.NoneType: st.none(),
    }[hint]


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Values of an option; of those that are a choice or an import path, what may be given."""
    limits, hint = option_info()[name].range, option_types()[name]
    if limits is None or str not in alternatives(hint):
        return values(hint)
    return values(hint).filter(lambda value: value is None or limits.holds(value))


CONFIGS = st.fixed_dictionaries({}, optional={name: values_of(name) for name in option_types()})


@settings(max_examples=50, deadline=None)
@given(options=CONFIGS)
def test_every_config_survives_the_file(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(config_text(TrainConfig(**options)))
    assert load_config(file) == TrainConfig(**options)


@settings(max_examples=20, deadline=None)
@given(options=CONFIGS)
def test_every_config_can_be_typed(options: dict[str, Any]) -> None:
    argv: list[str] = []
    for name, value in options.items():
        argv += [f"--{name}={item}" for item in (value if isinstance(value, tuple) else (value,))]
    assert parse_train(argv) == TrainConfig(**options)


def test_saved_file_has_a_table_per_section_and_leaves_out_what_is_unset(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config_text(TrainConfig(rank=4)))
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("[")] == [f"[{name}]" for name in SECTIONS]
    assert "rank = 4" in text
    assert "lora_alpha" not in text


def test_file_may_be_flat_and_use_other_names(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    text = 'image_size = 64\nmodel = "ddpm"\n[training]\nnum_epochs = 3\n'
    file.write_text(text, encoding="utf-8-sig")  # as some editors save it
    assert read_options(file) == {"resolution": 64, "model": "ddpm", "num_train_epochs": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[traning]\nseed = 1", "unknown section [traning]; did you mean training?"),
        ("[training]\nsed = 1", "unknown option 'sed'; did you mean seed?"),
        ("[training]\nseed = 'one'", "seed = 'one': expected a whole number"),
        ("seed = 1\n[training]\nseed = 2", "seed is given twice"),
        ("[model]\nseed = 1\n[training]\nseed = 2", "seed is given twice"),
        ("[training]\nnum_epochs = 1\nnum_train_epochs = 2", "num_epochs and num_train_epochs are one option"),
        ("seed = ", "is not valid TOML"),
        ("[training]\nseed = 1\nseed = 2", "is not valid TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    complaint = complaint_about_file(tmp_path, text)
    assert message in complaint
    assert "\n" not in complaint


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: No such file"):
        read_options(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_options(tmp_path / "binary.toml")


def test_values_of_other_types_that_commands_use() -> None:
    assert fitted(str, Path("a/b")) == "a/b"
    assert fitted(tuple[int, ...], [1, 2]) == (1, 2)
    assert fitted(tuple[str, ...] | None, None) is None
    assert readable(str | None) == "text"
    with pytest.raises(ValueError, match="expected a, b or a whole number; did you mean b"):
        fitted(Literal["a", "b"] | int, "bb")


def test_importing_the_config_imports_no_torch() -> None:
    code = "import sys, finetune.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_of_version_0_1_0_is_read_as_it_was(tmp_path: Path) -> None:
    """Its config.toml had every option in the sections, given or not, but left out the LoRA's layers."""
    decided = {"method": "full", "mixed_precision": "no", "resolution": 64, "caption_dropout": 0.05}
    decided |= {"max_train_steps": 10, "train_batch_size": 8, "learning_rate": 1e-4, "lr_scheduler": "constant"}
    decided |= {
        "gradient_accumulation_steps": 1,
        "lr_warmup_steps": 0,
        "adam_beta1": 0.9,
        "use_ema": False,
        "eval_batch_size": 2,
    }
    text = config_text(TrainConfig(model="tiny", data="images", num_inference_steps=20, guidance_scale=7.5, **decided))
    (tmp_path / "config.toml").write_text(text)
    resolved = load_resolved(tmp_path / "config.toml")
    assert (resolved.method, resolved.max_train_steps, resolved.guidance_scale) == ("full", 10, 7.5)
    assert (resolved.lora_alpha, resolved.lora_target_modules[0]) == (16.0, "to_q")


def test_a_recorded_config_with_something_left_open_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[model]\nmodel = "tiny"\n')
    with pytest.raises(UsageError, match=r"config\.toml: method, mixed_precision, .*left open"):
        load_resolved(tmp_path / "config.toml")


def test_what_a_repeated_run_decides_otherwise_is_told(tmp_path: Path) -> None:
    config = TrainConfig(model="tiny", data="x", rank=4)
    derived: dict[str, Any] = {name: getattr(config, name) for name in ResolvedConfig.__annotations__}
    derived |= {"method": "lora", "lora_alpha": 4.0, "lora_target_modules": ("to_q",), "mixed_precision": "no"}
    derived |= {"compile": False, "resolution": 64, "aspect_ratio_bucketing": True, "caption_dropout": 0.0}
    derived |= {"max_train_steps": 9, "train_batch_size": 4, "gradient_accumulation_steps": 1, "num_processes": 1}
    derived |= {"learning_rate": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0, "validation_fraction": 0.0}
    derived |= {"adam_beta1": 0.9, "max_grad_norm": 1.0, "use_ema": False, "eval_batch_size": 1}
    derived |= {"num_inference_steps": 20, "guidance_scale": 5.0}
    resolved = ResolvedConfig(config, **derived)
    path = tmp_path / "config.toml"
    path.write_text(config_text(resolved))
    assert f'[finetune]\nversion = "{importlib.metadata.version("finetune-unet")}"' in path.read_text()
    assert load_config(path) == config
    assert load_resolved(path) == resolved
    assert decided_otherwise(path, resolved) == ""
    other = ResolvedConfig(config, **derived | {"learning_rate": 2e-3, "lora_target_modules": ("to_q", "to_k")})
    told = decided_otherwise(path, other)
    assert told.startswith(
        f"decided otherwise than by the run of {path} (version {importlib.metadata.version('finetune-unet')}): "
    )
    assert "lora_target_modules ['to_q'] -> ['to_q', 'to_k']" in told
    assert "learning_rate 0.001 -> 0.002" in told


def test_several_resolutions_take_each_source_at_each_of_them():
    config = TrainConfig(data=["a", "b"], repeats=[1, 3], resolution=[768, 1024])
    assert (config.data, config.repeats, config.resolution) == (("a", "a", "b", "b"), (1, 1, 3, 3), 1024)
    assert config.source_settings == ("resolution = 768", "resolution = 1024") * 2
    own = TrainConfig(data=["a", "b"], source_settings=["prompt = 'x'", "resolution = 512"], resolution=(768, 1024))
    assert own.data == ("a", "a", "b")
    assert own.source_settings == (
        "prompt = 'x', resolution = 768",
        "prompt = 'x', resolution = 1024",
        "resolution = 512",
    )
    assert TrainConfig(resolution=[512]).resolution == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": [512, 768]}, "several resolutions are for --data"),
        ({"resolution": [512, 768], "data": "a", "repeats": [1, 2]}, "2 repeats and 1 source_settings for 1 --data"),
        ({"resolution": [512, "large"], "data": "a"}, "resolution = 'large': expected a whole number"),
    ],
)
def test_resolutions_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)

"""The command line: argv -> TrainConfig or a command; help, one-line errors and exit codes."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from finetune.cli import VERBS, main, parse_train
from finetune.config import ELSEWHERE, TrainConfig, config_text
from finetune.errors import DataError, Interrupted
from finetune.models.families import FAMILIES
from finetune.options import SECTIONS, option_info, option_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures."""

    run: str
    """Run folder."""
    prompts: tuple[str, ...] = ()
    """What to draw."""
    seeds: tuple[int, ...] | None = None
    """A seed per picture."""
    scheduler: Literal["ddim", "unipc"] = "ddim"
    """The sampler."""
    grid: bool = False
    """One picture of all pictures."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "set"))  # so that what main() sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options that a stand-in for the verb `sample` was run with."""
    calls: list[Options] = []
    module = types.ModuleType("finetune.commands.sample")
    module.__dict__.update(Options=Options, run=calls.append)
    monkeypatch.setitem(sys.modules, "finetune.commands.sample", module)
    return calls


SOME = ["--rank", "4", "--data", "."]
"""Options of a run whose pictures lie somewhere."""


def stand_in_recipe(monkeypatch: pytest.MonkeyPatch, fine_tune: Callable[[TrainConfig], Any]) -> None:
    module = types.ModuleType("finetune.recipe")
    module.__dict__["fine_tune"] = lambda config, repeats=None: fine_tune(config)
    monkeypatch.setitem(sys.modules, "finetune.recipe", module)


def raising(error: BaseException) -> Callable[[TrainConfig], Any]:
    def fine_tune(config: TrainConfig) -> None:
        raise error

    return fine_tune


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr after a wrong use."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("finetune-unet: ")
    return captured.err.removeprefix("finetune-unet: ").removesuffix("\n")


def test_the_mission() -> None:
    config = parse_train(["--model", "sd15", "--data", "./images", "--prompt", "a butterfly"])
    assert config == TrainConfig(model="sd15", data="./images", prompt="a butterfly")


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ("--learning_rate 1e-4", {"learning_rate": 1e-4}),
        ("--learning-rate=1e-4", {"learning_rate": 1e-4}),
        ("--noise_offset 0.1 --rank 4", {"noise_offset": 0.1, "rank": 4}),
        ("--image_size 64 --num-epochs 50", {"resolution": 64, "num_train_epochs": 50}),
        ("--validation_prompts a b", {"sample_prompts": ("a", "b")}),
        ("--max_token_length 150", {"max_token_length": 150}),
        ("--center_crop", {"center_crop": True}),
        ("--no-center_crop", {"center_crop": False}),
        ("--no_center_crop", {"center_crop": False}),
        ("--no-center-crop", {"center_crop": False}),
        ("--center_crop false", {"center_crop": False}),
        ("--use_ema", {"use_ema": True}),
        ("--use_ema True", {"use_ema": True}),
        ("--use_ema=False", {"use_ema": False}),
        ("--no-use_ema", {"use_ema": False}),
        ("--gradient_checkpointing --rank 8", {"gradient_checkpointing": True, "rank": 8}),
        ("--gradient_checkpointing 0.5", {"gradient_checkpointing": 0.5}),
        ("--no_gradient_checkpointing", {"gradient_checkpointing": False}),
        ("--sample_prompts a --rank 2 --sample_prompts b", {"sample_prompts": ("a", "b"), "rank": 2}),
        ("--sample_prompts a b --sample_prompts=c d", {"sample_prompts": ("a", "b", "c", "d")}),
        ("--sample_prompts a --validation_prompts b", {"sample_prompts": ("a", "b")}),
        ("--report_to tensorboard wandb", {"report_to": ("tensorboard", "wandb")}),
        ("--lora_target_modules to_q --lora-target-modules to_k", {"lora_target_modules": ("to_q", "to_k")}),
        ("--prompt=", {"prompt": ""}),
        ("--prompt=--rank=4", {"prompt": "--rank=4"}),
        ("--prompt -1", {"prompt": "-1"}),
    ],
)
def test_options(argv: str, options: dict[str, Any]) -> None:
    assert parse_train(argv.split(" ")) == TrainConfig(**options)


def test_texts_with_spaces_and_dashes() -> None:
    config = parse_train(["--sample_prompts", "a red one", "--ar 16:9, of a fox", "-", "--prompt", "x = y\nz"])
    assert config.sample_prompts == ("a red one", "--ar 16:9, of a fox", "-")
    assert config.prompt == "x = y\nz"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(config_text(TrainConfig(rank=4, seed=3, sample_prompts=["a", "b"], snr_gamma=5.0, use_ema=True)))
    assert parse_train(["--config", str(file)]).seed == 3
    flags = ["--rank", "8", "--sample_prompts", "c", "--snr_gamma", "None", "--no-use_ema"]
    expected = TrainConfig(rank=8, seed=3, sample_prompts=["c"], use_ema=False)
    assert parse_train([*flags, "--config", str(file)]) == expected
    assert parse_train(["--sample_prompts", "None", f"--config={file}"]).sample_prompts is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--leraning_rate 1", "unknown option --leraning_rate; did you mean --learning_rate?"),
        ("--leraning-rate=1", "unknown option --leraning-rate; did you mean --learning_rate?"),
        ("--lr 1e-4", "unknown option --lr; did you mean --learning_rate?"),
        ("--network_dim 8", "unknown option --network_dim; did you mean --rank?"),
        ("--unet_lr 1e-4", "unknown option --unet_lr; did you mean --learning_rate?"),
        ("--flip_aug", "unknown option --flip_aug; did you mean --random_flip?"),
        ("--log_with wandb", "unknown option --log_with; did you mean --report_to?"),
        ("--resume x", "unknown option --resume; did you mean --resume_from_checkpoint?"),
        ("--save_every_n_steps 5", "unknown option --save_every_n_steps; did you mean --checkpointing_steps?"),
        ("--save_model_as safetensors", "unknown option --save_model_as; exports are safetensors"),
        (
            "--cache_latents",
            "unknown option --cache_latents; every image and caption is encoded once anyway, and kept in --cache_dir",
        ),
        ("--train_text_encoder", "unknown option --train_text_encoder; the text encoder stays frozen here"),
        ("--logging_dir x", "unknown option --logging_dir; trackers write into logs/ of the run folder"),
        ("--use_8bit_adam", "unknown option --use_8bit_adam; give --optimizer adamw8bit"),
        ("--dataset_config x.toml", "unknown option --dataset_config; give the file as --data"),
        ("--data nowhere.toml", "--data nowhere.toml: No such file or directory"),
        ("--reg_data_dir x", "unknown option --reg_data_dir; did you mean --class_data?"),
        ("--no-centre_crop", "unknown option --no-centre_crop; did you mean --no_center_crop?"),
        ("--no_rank", "unknown option --no_rank; did you mean --rank?"),
        ("-rank 4", "unknown option -rank; did you mean --rank?"),
        ("--xyzzy", "unknown option --xyzzy"),
        ("--method loar", "--method loar: choose one of lora, full; did you mean lora?"),
        ("--report_to wand", "--report_to wand: choose one of tensorboard, wandb, trackio; did you mean wandb?"),
        ("--rank many", "--rank many: expected a whole number"),
        ("--rank 4.0", "--rank 4.0: expected a whole number"),
        ("--rank None", "--rank None: expected a whole number"),
        ("--learning_rate nan", "--learning_rate nan: expected a number"),
        ("--use_ema maybe", "--use_ema maybe: expected true or false"),
        ("--rank", "--rank needs a value (a whole number)"),
        ("--rank --seed 1", "--rank needs a value (a whole number)"),
        ("--sample_prompts", "--sample_prompts needs a value (a list of: text)"),
        ("--sample_prompts a --sample_prompts", "--sample_prompts needs a value (a list of: text)"),
        ("--rank 0", "rank = 0: expected 1 or more"),
        ("--seed 1 --rank 2 --seed 1", "--seed is given twice"),
        ("--use_ema --use_ema", "--use_ema is given twice"),
        ("--image_size 1 --resolution 1", "--image_size and --resolution are one option: give one of them"),
        ("--use_ema --no-use_ema", "--use_ema and --no-use_ema are one option: give one of them"),
        ("--no-use_ema True", "--no-use_ema takes no value, but 'True' follows"),
        ("--use_ema 0.5", "--use_ema 0.5: expected true or false"),
        ("--gradient_checkpointing half", "--gradient_checkpointing half: expected true or false or a number"),
        ("--gradient_checkpointing 1.5", "gradient_checkpointing = 1.5: expected from 0 to 1, or true or false"),
        ("--prompt a butterfly", "--prompt takes one value, but 'butterfly' follows 'a'; put quotes around a text"),
        ("--config none.toml", "config file none.toml: No such file or directory"),
        (
            "samle",
            "unknown command 'samle'; did you mean sample? "
            "(commands: sample, export, check, preview, ui, compare, plan, inspect, import, convert, cache, lora; "
            "options alone train)",
        ),
        (
            "samle --help",
            "unknown command 'samle'; did you mean sample? "
            "(commands: sample, export, check, preview, ui, compare, plan, inspect, import, convert, cache, lora; "
            "options alone train)",
        ),
    ],
)
def test_wrong_use_is_told_in_one_line(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    assert complaint(capsys, *argv.split()) == message


def test_a_wrong_file_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[training]\nsede = 1\n", encoding="utf-8")
    message = f"config file {file}: unknown option 'sede'; did you mean seed?"
    assert complaint(capsys, "--config", str(file)) == message


def test_training_gets_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[TrainConfig] = []
    stand_in_recipe(monkeypatch, configs.append)
    assert main([*SOME, "--debug", "--seed", "1"]) == 0
    assert configs == [TrainConfig(data=".", rank=4, seed=1)]


def test_environment_is_set_before_training_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str | None]] = []

    def fine_tune(config: TrainConfig) -> None:
        seen.append((os.environ.get("OMP_WAIT_POLICY"), os.environ.get("TOKENIZERS_PARALLELISM")))

    stand_in_recipe(monkeypatch, fine_tune)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    main(SOME)
    assert seen == [("PASSIVE", "true")]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("no images in ./images"), 1, "no images in ./images"),
        (Interrupted("stopped at step 7", 143), 143, "stopped at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    stand_in_recipe(monkeypatch, raising(error))
    assert main(SOME) == code
    assert capsys.readouterr().err == f"finetune-unet: {message}\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in_recipe(monkeypatch, raising(DataError("no images")))
    assert main(["--debug", *SOME]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("finetune-unet: no images\n")


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_recipe(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(SOME)


def test_verb_gets_its_options(sampled: list[Options]) -> None:
    assert main(["sample", "--run", "runs/a", "--prompts", "x", "y", "--seeds", "1", "-2", "--grid"]) == 0
    assert main(["--debug", "sample", "--run", "runs/b", "--scheduler", "unipc"]) == 0
    assert sampled == [
        Options(run="runs/a", prompts=("x", "y"), seeds=(1, -2), grid=True),
        Options(run="runs/b", scheduler="unipc"),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("sample", "sample needs --run"),
        ("sample runs/a", "'runs/a' follows no option; every value comes after its --option"),
        ("sample --rum a", "unknown option --rum; did you mean --run?"),
        ("sample --seeds 1 x", "--seeds x: expected a whole number"),
        ("sample --scheduler dim", "--scheduler dim: choose one of ddim, unipc; did you mean ddim?"),
        ("sample --validation_prompts a", "unknown option --validation_prompts; did you mean --prompts?"),
    ],
)
def test_wrong_use_of_a_verb(
    sampled: list[Options], capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    assert complaint(capsys, *argv.split()) == message
    assert sampled == []


def test_help_of_a_verb(sampled: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--run", "x", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: finetune-unet sample")
    for part in ("Draw pictures.", "--run", "--grid, --no_grid", "The sampler. (default: ddim)", "(required)"):
        assert part in text
    assert sampled == []


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert 'finetune-unet --model sd15 --data ./images --prompt "a butterfly"' in text
    words = [word for verb in VERBS for word in verb.split()]
    for word in (*words, *FAMILIES, *(f"--{name}" for name in option_types()), "--config", "--debug", "--version"):
        assert word in text
    for heading, section in SECTIONS.items():
        assert f"{heading} options" in text
        assert section.__doc__ is not None
        assert section.__doc__ in text
    assert "LoRA rank. (default: 16)" in text
    assert "None" not in text


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "--help"]) == 0
    assert "finetune-unet lora merge    merge LoRA files into a model" in capsys.readouterr().out
    assert main(["lora", "merge", "--help"]) == 0
    assert "--strength" in capsys.readouterr().out


def test_no_arguments_print_one_screenful(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert 'finetune-unet --model sd15 --data ./images --prompt "a butterfly"' in captured.err
    assert captured.err.count("\n") < 24


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"finetune-unet {importlib.metadata.version('finetune-unet')}\n"


def test_help_and_errors_import_nothing_heavy() -> None:
    code = """
import sys
from finetune.cli import main
assert main(["--help"]) == 0
assert main(["--rank", "many"]) == 2
assert main(["--model", "sd16", "--data", "."]) == 2
assert main(["--data", "nowhere"]) == 2
sys.exit(", ".join({"torch", "diffusers", "transformers", "accelerate"} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("finetune-unet: ") for line in done.stderr.splitlines()]
    assert lines[0] == "--rank many: expected a whole number"
    assert lines[1].startswith("--model sd16: no such folder, and not one of sd15")
    assert lines[2] == "--data nowhere: no such folder, and not a Hugging Face dataset id (owner/name)"


def test_exit_code_of_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "--rank", "many"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "finetune-unet: --rank many: expected a whole number\n"


def test_reader_who_leaves_early() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 141


def test_what_other_tools_call_an_option_names_one_thing() -> None:
    called = [name for known in option_info().values() for name in (*known.aliases, *known.suggest_for)]
    assert len(called) == len(set(called))
    assert not set(called) & (set(option_types()) | set(ELSEWHERE))
    assert not set(option_types()) & set(ELSEWHERE)

"""What is understood of words that are not options as they stand in --help."""

import logging
from pathlib import Path

import pytest

from finetune.cli import main, parse_train
from finetune.config import TrainConfig
from tests.test_cli import complaint, stand_in_recipe


@pytest.mark.parametrize("flag", ["num_train_epochs", "max_train_steps"])
def test_a_length_as_a_flag_replaces_both_of_the_file(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("max_train_steps = 500\nnum_train_epochs = 7\nrank = 4\n")
    config = parse_train(["--config", str(file), f"--{flag}", "3"])
    given = {"num_train_epochs": None, "max_train_steps": None} | {flag: 3}
    assert {name: getattr(config, name) for name in given} == given
    assert config.rank == 4


def test_bitsandbytes_says_nothing_of_kernels_that_are_not_used() -> None:
    assert main(["--version"]) == 0
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_train_in_front_and_a_folder_alone_are_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configs: list[TrainConfig] = []
    stand_in_recipe(monkeypatch, configs.append)
    assert main(["train", "--data", str(tmp_path), "--model", "sd15"]) == 0
    assert main([str(tmp_path), "--model", "sd15"]) == 0
    assert configs == [TrainConfig(data=str(tmp_path), model="sd15")] * 2
    assert capsys.readouterr().out == ""
    for words in (["help"], ["train"], ["train", "--help"]):
        assert main(words) == 0
        assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 124" in capsys.readouterr().out
    assert main(["help", "sample"]) == 0
    assert "--negative_prompt" in capsys.readouterr().out


def test_without_a_model_it_is_said_before_and_after_what_tiny_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_recipe(monkeypatch, lambda config: print("training"))
    assert main(["--data", "."]) == 0
    before, middle, after = capsys.readouterr().out.splitlines()
    assert middle == "training"
    assert before == after
    assert "no --model was given, so this is tiny: 64 px" in before
    assert "--model sd15" in before
    main(["--data", ".", "--model", "tiny"])
    assert capsys.readouterr().out == "training\n"


def test_words_of_other_tools_lead_to_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint(capsys, "generate", "--prompt", "x").startswith("unknown command 'generate'; did you mean sample?")
    told = complaint(capsys, "--unet_lr", "1", "--xyzzy", "--network_dim", "4", "--cache_latents")
    assert told.startswith(
        "unknown options: --unet_lr (did you mean --learning_rate?), --xyzzy, --network_dim (did you"
    )
    assert told.endswith("; finetune-unet import --file FILE takes another tool's command line or config over")
    two = complaint(capsys, "--sede", "1", "--xyzzy")
    assert two == "unknown options: --sede (did you mean --seed?), --xyzzy"

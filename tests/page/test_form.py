"""What is filled in on the page, as words, and which folders are open to it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import parse_train
from finetune.errors import UsageError
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.form import Form


@pytest.fixture
def places(tmp_path: Path, make_pictures: Callable[..., Path]) -> AllowedPaths:
    make_pictures(tmp_path / "open/a/cats", count=2)
    make_pictures(tmp_path / "closed", count=2)
    (tmp_path / "work/runs/one/samples").mkdir(parents=True)
    return AllowedPaths([tmp_path / "open"], tmp_path / "work")


def test_it_is_what_the_command_line_understands(places: AllowedPaths, tmp_path: Path) -> None:
    cats = str(tmp_path / "open/a/cats")
    more = "--rank 8 --no_random_flip --learning-rate=1e-3"
    words = Form(
        cats, "tiny", method="lora", prompt="--odd, 'cat'", trigger="sks", steps=5, early_stop=True, more=more
    ).words(places)
    config = parse_train(words)
    assert (config.data, config.prompt, config.trigger, config.rank) == ((cats,), "--odd, 'cat'", "sks", 8)
    assert (config.max_train_steps, config.learning_rate, config.early_stop) == (5, 1e-3, True)
    fields = {"model", "data", "method", "prompt", "trigger", "max_train_steps", "early_stop"}
    assert config.given == fields | {"follow_links", "rank", "random_flip", "learning_rate"}


@pytest.mark.parametrize("data", ["", "/", "closed", "open/../closed", "open/link"])
def test_nothing_outside_of_what_was_named_is_opened(places: AllowedPaths, tmp_path: Path, data: str) -> None:
    (tmp_path / "open/link").symlink_to(tmp_path / "closed")
    with pytest.raises(UsageError, match="expected what lies in"):
        Form(str(tmp_path / data) if data else "").words(places)
    with pytest.raises(UsageError, match="no run in"):
        places.run("../../closed")
    assert places.picture_folders() == [str(tmp_path / "open/a/cats")]
    (tmp_path / "open/shards").mkdir()
    (tmp_path / "open/shards/0.tar").touch()
    assert places.picture_folders() == [str(tmp_path / "open/shards"), str(tmp_path / "open/a/cats")]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("--output_dir /etc", "is for the command line"),
        ("--overwrite_output_dir", "is for the command line"),
        ("--push_to_hub", "is for the command line"),
        ("--report_to wandb", "is for the command line"),
        ("--export_formats unet", "is for the command line"),
        ("--follow_links", "is for the command line"),
        ("--resume_from_checkpoint latest", "is for the command line"),
        ("--config=/etc/passwd", "no option"),
        ("--cache-dir x", "takes text"),
        ("--validation_prompts x", "takes text"),
        ("--optimizer os:system", "takes text"),
        ("--optimizer=os:system", "takes text"),
        ("--optimizer lion --lr_scheduler os:system", "takes text"),
        ("--optimizer_args fused=True", "takes text"),
        ("--data x", "takes text"),
        ("rank 8", "follows no option"),
        ("--rank 'x", "No closing quotation"),
    ],
)
def test_options_that_could_name_a_path_are_for_the_command_line(
    places: AllowedPaths, tmp_path: Path, more: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        Form(str(tmp_path / "open/a"), "tiny", more=more).words(places)


def test_a_model_is_one_that_is_known_or_lies_in_the_open(places: AllowedPaths, tmp_path: Path) -> None:
    (tmp_path / "open/model").mkdir()
    given = {"sd15": "sd15", "owner/name": "owner/name", str(tmp_path / "open/model"): str(tmp_path / "open/model")}
    for model, meant in given.items():
        assert Form(str(tmp_path / "open/a"), model=model).words(places)[:2] == ["--model", meant]
    for model in (str(tmp_path / "closed"), "../closed", "nothing"):
        with pytest.raises(UsageError, match=r"model .* choose one of"):
            Form(str(tmp_path / "open/a"), model=model).words(places)


def test_a_file_that_may_name_other_folders_is_for_the_command_line(places: AllowedPaths, tmp_path: Path) -> None:
    (tmp_path / "open/data.toml").write_text("")
    with pytest.raises(UsageError, match=r"data.toml: such a file may name folders"):
        Form(str(tmp_path / "open/data.toml")).words(places)

"""What is filled in on the page, as words, and which folders are open to it."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import parse_train
from finetune.errors import UsageError
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.form import filled_by, form_words
from finetune.page.option_fields import option_fields


@pytest.fixture
def places(tmp_path: Path, make_pictures: Callable[..., Path]) -> AllowedPaths:
    make_pictures(tmp_path / "open/a/cats", count=2)
    make_pictures(tmp_path / "closed", count=2)
    (tmp_path / "work/runs/one/samples").mkdir(parents=True)
    return AllowedPaths([tmp_path / "open"], tmp_path / "work")


def test_it_is_what_the_command_line_understands(places: AllowedPaths, tmp_path: Path) -> None:
    cats = str(tmp_path / "open/a/cats")
    more = "--rank 8 --no_random_flip --learning-rate=1e-3"
    filled = {"data": cats, "model": "tiny", "method": "lora", "prompt": "--odd, 'cat'", "trigger": "sks"}
    filled |= {"steps": "5", "early_stop": "on", "more": more}
    words = form_words(filled, places)
    config = parse_train(words)
    assert (config.data, config.prompt, config.trigger, config.rank) == ((cats,), "--odd, 'cat'", "sks", 8)
    assert (config.max_train_steps, config.learning_rate, config.early_stop) == (5, 1e-3, True)
    fields = {"model", "data", "method", "prompt", "trigger", "max_train_steps", "early_stop"}
    assert config.given == fields | {"follow_links", "rank", "random_flip", "learning_rate"}


@pytest.mark.parametrize("data", ["", "/", "closed", "open/../closed", "open/link"])
def test_nothing_outside_of_what_was_named_is_opened(places: AllowedPaths, tmp_path: Path, data: str) -> None:
    (tmp_path / "open/link").symlink_to(tmp_path / "closed")
    with pytest.raises(UsageError, match="expected what lies in"):
        form_words({"data": str(tmp_path / data) if data else "", "model": "tiny"}, places)
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
        form_words({"data": str(tmp_path / "open/a"), "model": "tiny", "more": more}, places)


def test_a_model_is_one_that_is_known_or_lies_in_the_open(places: AllowedPaths, tmp_path: Path) -> None:
    (tmp_path / "open/model").mkdir()
    given = {"sd15": "sd15", "owner/name": "owner/name", str(tmp_path / "open/model"): str(tmp_path / "open/model")}
    for model, meant in given.items():
        assert form_words({"data": str(tmp_path / "open/a"), "model": model}, places)[:2] == ["--model", meant]
    for model in (str(tmp_path / "closed"), "../closed", "nothing"):
        with pytest.raises(UsageError, match=r"model .* choose one of"):
            form_words({"data": str(tmp_path / "open/a"), "model": model}, places)


def test_a_file_that_may_name_other_folders_is_for_the_command_line(places: AllowedPaths, tmp_path: Path) -> None:
    (tmp_path / "open/data.toml").write_text("")
    with pytest.raises(UsageError, match=r"data.toml: such a file may name folders"):
        form_words({"data": str(tmp_path / "open/data.toml"), "model": "tiny"}, places)


def test_every_field_of_the_form_is_an_option_of_the_command(places: AllowedPaths, tmp_path: Path) -> None:
    fields = {name: field for section in option_fields().values() for name, field in section.items()}
    assert {"rank", "snr_gamma", "sample_prompts", "optimizer", "class_data", "caption_prefix"} <= fields.keys()
    assert not fields.keys() & {"output_dir", "push_to_hub", "cache_dir", "init_lora", "optimizer_args", "data", "vae"}
    assert all(field.meaning for field in fields.values())
    values = {"switch": "yes", "number": "1", "text": "a", "lines": "a cat\na dog", "folder": str(tmp_path / "open/a")}
    cats = {"data": str(tmp_path / "open/a/cats"), "model": "tiny"}
    for name, field in fields.items():
        value = field.choices[-1] if field.kind == "choice" else values[field.kind]
        filled = cats | {f"option.{name}": value}
        words = form_words(filled, places)
        assert filled_by(words) == filled
        with contextlib.suppress(UsageError):  # 1 is out of the range of some
            assert name in parse_train(words).given


def test_a_switch_is_turned_off_and_prompts_are_lines(places: AllowedPaths, tmp_path: Path) -> None:
    filled = {"data": str(tmp_path / "open/a/cats"), "model": "tiny", "option.use_ema": "no"}
    filled |= {"option.sample_prompts": "a cat, 'odd'\n\n a dog --n red ", "option.rank": "4", "more": ""}
    config = parse_train(form_words(filled, places))
    assert (config.use_ema, config.rank, config.sample_prompts) == (False, 4, ("a cat, 'odd'", "a dog --n red"))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("sample_prompts", "a cat\n--output_dir=/etc", "expected no dash at its beginning"),
        ("sample_prompts", "prompts.txt", "is a file, and is for the command line"),
        ("lora_target_modules", "to_q --output_dir=/etc", "expected no dash at its beginning"),
        ("class_data", "/etc", "expected what lies in"),
    ],
)
def test_fields_name_no_file_and_no_other_option(
    places: AllowedPaths, tmp_path: Path, name: str, value: str, why: str
) -> None:
    (places.work / "prompts.txt").write_text("a cat")
    with pytest.raises(UsageError, match=why):
        form_words({"data": str(tmp_path / "open/a"), "model": "tiny", f"option.{name}": value}, places)


@pytest.mark.parametrize("name", ["", ".", "..", "../runs/one", "one/", "/etc", ".deleted", "two"])
def test_a_run_is_a_folder_of_runs_and_nothing_else(places: AllowedPaths, tmp_path: Path, name: str) -> None:
    (places.runs / ".deleted/samples").mkdir(parents=True)
    (tmp_path / "elsewhere/samples").mkdir(parents=True)
    (places.runs / "two").symlink_to(tmp_path / "elsewhere")
    assert places.is_run("one")
    assert not places.is_run(name)
    assert places.run_names() == ["one"]

"""Pushing to a hub on loopback: what is committed, what the model card says, and how failures are told."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from finetune.config import TrainConfig, as_settings
from finetune.errors import RunError, UsageError
from finetune.models.families import FAMILIES
from finetune.models.inpainting import Inpainting
from finetune.models.loading import load_model
from finetune.models.lora import add_lora
from finetune.options import option_info, option_types
from finetune.results.export import export
from finetune.results.hub import check_login, push, repository_name
from finetune.results.model_card import model_card
from tests.hub_server import TOKEN, Hub, Repository, hub_environment
from tests.tiny_copy import copy_tiny

LORA = "pytorch_lora_weights.safetensors"
HOSTILE = (
    'a "cat" | a <b>dog</b>\n---\nlicense: evil\n---\n```\n# not a heading\n| a | b |\r\n&amp; \\ \\| \x07 \x85 🦋'
)


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in the environment, and a hub that is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hub(logged_in: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub within reach."""
    with Hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        yield server


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished LoRA run: what is to be pushed, and all else that a run or its user leaves there."""
    folder = tmp_path / "my cats (v1.5)-sd15"
    pushed = [LORA, "metrics.jsonl", "samples/step-0.png", "samples/step-9.png", "samples/step-10.png"]
    private = ["config.toml", "timings.jsonl", "result.json", ".env", "notes.txt", "samples/me.jpg", "logs/events"]
    scratch = ["checkpoint-10/trainable.safetensors", ".checkpoint-9.part/state.json", f".export.part/{LORA}"]
    for name in [*pushed, *private, *scratch, "unet/config.json", ".metrics.jsonl.part"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    save_file({"unet.some.lora_A.weight": torch.zeros(1)}, folder / LORA)
    return folder


def card(folder: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """The front matter and the rest of the model card of a run with these settings."""
    text = model_card(folder, "someone/cats", settings)
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def block(body: str, language: str) -> str:
    """The one code block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", body, flags=re.MULTILINE | re.DOTALL)
    return found


def outside_of_code(body: str) -> str:
    return re.sub(r"^```\w+\n.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)


def push_fails(folder: Path, repository: str | None = "cats", private: bool = False) -> str:
    """The message of a push that must fail: one line, which names the folder and not the token."""
    with pytest.raises(RunError) as caught:
        push(folder, repository, private=private, settings={})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder} holds the complete export")
    assert TOKEN not in message
    return message


def test_exactly_the_results_of_a_lora_run_are_pushed(hub: Hub, run_folder: Path):
    address = push(run_folder, "cats", private=False, settings={})
    files = hub.repositories["someone/cats"].files
    pictures = {f"samples/step-{step}.png" for step in (0, 9, 10)}
    assert files.keys() == {LORA, "metrics.jsonl", "README.md"} | pictures
    assert all(files[name] == (run_folder / name).read_bytes() for name in files.keys() - {"README.md"})
    assert address == f"{hub.url}/someone/cats"
    assert not (run_folder / "README.md").exists()  # output_dir may be a folder that has one


def test_exactly_the_parts_of_a_pipeline_are_pushed(hub: Hub, tmp_path: Path):
    copy_tiny(tmp_path)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("unet/.DS_Store", ".unet.part", "checkpoint-10/trainable.safetensors", "secret/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    push(tmp_path, "other/cats", private=False, settings={})
    assert {"unet/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json"} < built
    assert hub.repositories["other/cats"].files.keys() == built | {"README.md"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_no_push_tells_where_the_base_model_lies(hub: Hub, tmp_path: Path, method: str):
    base, folder = tmp_path / "somewhere-private" / "base", tmp_path / "run"
    copy_tiny(base)
    model = load_model(base)
    if method == "lora":
        add_lora(model.unet, rank=2)
    export(model, folder)
    settings = {"model": str(base), "data": (str(base / "images"),), "output_dir": str(folder)}
    settings["resume_from_checkpoint"] = str(base / "checkpoint-5")
    push(folder, "cats", private=False, settings=settings)
    files = hub.repositories["someone/cats"].files
    assert [path for path, content in files.items() if b"somewhere-private" in content] == []
    assert b'"images",' in files["README.md"]


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_as_private_as_asked(hub: Hub, run_folder: Path, private: bool):
    push(run_folder, "cats", private=private, settings={})
    assert hub.repositories["someone/cats"].private is private


def test_what_shall_be_private_is_not_pushed_to_a_public_repository(hub: Hub, run_folder: Path):
    hub.repositories["someone/cats"] = Repository(private=False)
    assert "exists and is public" in push_fails(run_folder, private=True)
    assert hub.repositories["someone/cats"].files == {}
    hub.repositories["someone/cats"].private = True
    push(run_folder, "cats", private=True, settings={})
    assert LORA in hub.repositories["someone/cats"].files


def test_the_default_repository_is_named_after_the_folder(hub: Hub, run_folder: Path):
    push(run_folder, None, private=False, settings={})
    assert list(hub.repositories) == ["someone/my-cats-v1-5-sd15"]


def test_a_repository_of_another_run_is_not_written_over(hub: Hub, run_folder: Path, tmp_path: Path):
    """Two projects, each with ./images, have run folders of the same name."""
    other = tmp_path / "another project" / run_folder.name
    shutil.copytree(run_folder, other)
    push(run_folder, None, private=None, settings={})
    files = dict(hub.repositories["someone/my-cats-v1-5-sd15"].files)
    assert "exists already, of another run; give another name with --hub_model_id" in push_fails(other, None)
    assert hub.repositories["someone/my-cats-v1-5-sd15"].files == files
    push(run_folder, None, private=None, settings={})  # what it has pushed itself


def test_a_repository_that_was_not_pushed_from_here_is_not_written_over(hub: Hub, run_folder: Path):
    hub.repositories["someone/cats"] = Repository(files={"README.md": b"---\ntags:\n- mine\n---\n", "a.bin": b"a"})
    assert "exists already and was not pushed by finetune; give another --hub_model_id" in push_fails(run_folder)
    assert hub.repositories["someone/cats"].files.keys() == {"README.md", "a.bin"}
    hub.repositories["someone/cats"].files["README.md"] = b"---\ntags:\n- finetune-unet\n---\n"
    push(run_folder, "cats", private=None, settings={})
    assert LORA in hub.repositories["someone/cats"].files


def test_a_repository_is_private_unless_asked(hub: Hub, run_folder: Path):
    push(run_folder, "cats", private=None, settings={})
    push(run_folder, "dogs", private=False, settings={})
    assert (hub.repositories["someone/cats"].private, hub.repositories["someone/dogs"].private) == (True, False)


def test_every_option_that_may_be_a_path_is_shortened_in_the_card(run_folder: Path):
    paths = {name: f"/home/someone/{name}.x" for name, known in option_info().items() if known.path}
    assert paths.keys() >= {"model", "data", "class_data", "validation_data", "init_lora", "vae", "tokenizer"}
    several = {name: (path, "~/more.x", "../y.x") if name == "data" else path for name, path in paths.items()}
    several["sample_prompts"] = ("/home/someone/prompts.txt", "a cat and/or a dog")
    _, body = card(run_folder, **several)
    assert "/home" not in body
    said = tomllib.loads(block(body, "toml"))
    assert said["vae"] == "vae.x"
    assert said["data"] == ["data.x", "more.x", "y.x"]
    assert said["sample_prompts"] == ["prompts.txt", "a cat and/or a dog"]
    texts = {name for name, kind in option_types().items() if "str" in str(kind)}
    no_paths = {"lora_target_modules", "block_rank", "block_learning_rate", "prompt", "trigger", "class_prompt"}
    no_paths |= {
        "lr_scheduler",
        "source_settings",
        "caption_prefix",
        "caption_suffix",
        "caption_separator",
        "keep_tokens_separator",
        "secondary_separator",
        "train_modules",
        "optimizer",
        "optimizer_args",
        "background",
        "image_column",
        "caption_column",
        "hub_model_id",
        "tracker_project_name",
        "allow_changed",
    }
    of_this_machine = {"cache_dir", "output_dir", "resume_from_checkpoint"}  # are not in the card at all
    assert texts == paths.keys() | no_paths | of_this_machine, "mark a new option as a path, or name it here"


@pytest.mark.parametrize("name", ["Käse", "-.-", "a--b..c", "x" * 300, "a.git", "$(rm)", "写真", "_", f"{'x' * 95}-y"])
def test_every_folder_name_makes_a_repository_name(tmp_path: Path, name: str):
    check_login(repository_name(tmp_path / name))


def test_a_folder_without_an_export_is_not_pushed(hub: Hub, tmp_path: Path):
    with pytest.raises(RunError, match="no export to push"):
        push(tmp_path, "cats", private=False, settings={})


def test_an_unreachable_hub_is_told_in_one_line(run_folder: Path):
    assert "refused" in push_fails(run_folder)


def test_a_refused_token_is_told_in_the_words_of_the_hub_without_the_token(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    message = push_fails(run_folder)
    assert "Invalid username or password. You sent Bearer ***." in message
    assert hub.repositories == {}


def test_without_a_token_nothing_is_tried(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run_folder / "no-token"))
    with pytest.raises(UsageError, match=r"not logged in.*`hf auth login`.*HF_TOKEN"):
        check_login()
    assert "not logged in" in push_fails(run_folder)


def test_a_token_that_cannot_be_sent_is_found_before_training_and_not_shown(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x01")
    with pytest.raises(UsageError, match="character that no token has") as caught:
        check_login()
    assert TOKEN not in str(caught.value)
    push_fails(run_folder)


@pytest.mark.parametrize("name", ["a/b/c", "my cats", "-cats", "cats.git", "a--b", "/cats", "käse"])
def test_an_impossible_repository_name_is_found_before_training(name: str):
    with pytest.raises(UsageError, match=re.escape(f"hub_model_id {name!r}")):
        check_login(name)


def test_offline_mode_is_found_before_training(run_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_login()
    assert "HF_HUB_OFFLINE is set" in push_fails(run_folder)


def test_the_check_before_training_needs_no_network():
    check_login()
    check_login("someone/cats_2.0")


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("sd15", FAMILIES["sd15"].hub_id),
        ("sd21", FAMILIES["sd21"].hub_id),
        ("owner/model-1.5", "owner/model-1.5"),
        ("/home/someone/models/model", None),
        ("/model", None),
        ("/home/someone/sd15", None),
        ("../models/model", None),
        ("tiny", None),
    ],
)
def test_only_a_repository_is_named_as_base_model(run_folder: Path, model: str, base: str | None):
    front, body = card(run_folder, model=model)
    assert front.get("base_model") == base
    assert (f"trained from `{base}` with" in body) == (base is not None)
    assert tomllib.loads(block(body, "toml"))["model"] == (model if base else Path(model).name)


def test_a_folder_that_is_named_like_a_repository_is_not_taken_for_one(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(run_folder, model="models/mine")[0]


def test_a_data_set_of_the_hub_is_named(run_folder: Path):
    assert card(run_folder, data=("owner/pictures",))[0]["datasets"] == ["owner/pictures"]
    assert "datasets" not in card(run_folder, data=("/home/someone/pictures",))[0]


def test_the_front_matter_says_what_was_trained(run_folder: Path, tmp_path: Path):
    front, body = card(run_folder, model="sd15")
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert "lora" in front["tags"]
    assert "A LoRA" in body
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", "unet": [], "scheduler": []}))
    front, body = card(tmp_path, model="ddpm")
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "lora" not in front["tags"]
    assert "pipeline().images[0]" in block(body, "python")


def test_the_card_of_an_inpainting_model_gives_it_a_picture(run_folder: Path) -> None:
    text = model_card(
        run_folder, "someone/cats", {"model": "sd15-inpainting"}, image_inputs=Inpainting.pipeline_example
    )
    assert "pipeline_tag: image-to-image" in text
    code = ast.parse(block(text, "python"))
    assert {alias.name for node in ast.walk(code) if isinstance(node, ast.ImportFrom) for alias in node.names} == {
        "Image",
        "DiffusionPipeline",
    }
    (call,) = [node for node in ast.walk(code) if isinstance(node, ast.Call) and len(node.keywords) == 2]
    assert [keyword.arg for keyword in call.keywords] == ["image", "mask_image"]
    assert str(FAMILIES["sd15-inpainting"].hub_id) in text


def test_the_card_shows_the_last_sample_grid(run_folder: Path):
    assert "![samples](samples/step-10.png)" in outside_of_code(card(run_folder)[1])
    for path in (run_folder / "samples").iterdir():
        path.unlink()
    assert "![" not in card(run_folder)[1]


def test_the_settings_in_the_card_repeat_the_run(run_folder: Path):
    config = TrainConfig(
        model="sd15", data="owner/cats", prompt=HOSTILE, sample_prompts=(HOSTILE, "b"), learning_rate=1e-4, rank=4
    )
    _, body = card(run_folder, **as_settings(config))
    assert TrainConfig(**tomllib.loads(block(body, "toml"))) == config


def test_captions_stay_inside_code_blocks(run_folder: Path):
    front, body = card(run_folder, model="sd15", prompt=HOSTILE, trigger=HOSTILE, sample_prompts=(HOSTILE,))
    plain_front, plain_body = card(run_folder, model="sd15", prompt="a cat")
    assert front == plain_front
    assert outside_of_code(body) == outside_of_code(plain_body)
    strings = [node.value for node in ast.walk(ast.parse(block(body, "python"))) if isinstance(node, ast.Constant)]
    assert HOSTILE in strings


def test_the_last_setting_of_a_run_is_nobodys_folder(run_folder: Path):
    settings = {"output_dir": "/home/someone/out", "resume_from_checkpoint": "/home/someone/out/checkpoint-5"}
    _, body = card(
        run_folder, **settings, data=("/home/someone/images/",), model="/home/someone/model", hub_model_id="x"
    )
    assert "/home" not in body
    assert tomllib.loads(block(body, "toml")) == {"data": ["images"], "model": "model"}
    assert 'from_pretrained("model")  # a folder that is not on the hub' in block(body, "python")


TRAIN_AND_FOLLOW_THE_CARD = """
import re, sys
from huggingface_hub import hf_hub_download
import finetune

finetune.fine_tune(finetune.load_config(sys.argv[1]))
card = open(hf_hub_download("someone/discs", "README.md"), encoding="utf-8").read()
(code,) = re.findall(r"^```python\\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
names = {}
exec(code, names)
names["image"].save(sys.argv[2])
"""


def test_a_run_is_pushed_and_its_card_tells_how_to_draw_with_it(tmp_path: Path, pictures: Path):
    config, picture = tmp_path / "run.toml", tmp_path / "picture.png"
    config.write_text(
        f'model = "tiny"\ndata = "{pictures}"\noutput_dir = "{tmp_path / "out"}"\nlearning_rate = 3e-4\n'
        "max_train_steps = 2\nnum_inference_steps = 0\ncheckpointing_steps = 1\n"
        'push_to_hub = true\nhub_model_id = "discs"\nhub_private_repo = true\n'
    )
    with Hub() as hub:
        environment = hub_environment(hub.url, tmp_path / "home")
        command = [sys.executable, "-c", TRAIN_AND_FOLLOW_THE_CARD, str(config), str(picture)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    repository = hub.repositories["someone/discs"]
    assert repository.private
    assert repository.files.keys() == {LORA, "out.safetensors", "metrics.jsonl", "README.md"}
    assert repository.files[LORA] == (tmp_path / "out" / LORA).read_bytes()
    assert b"learning_rate = 0.0003" in repository.files["README.md"]
    assert all(str(tmp_path).encode() not in content for content in repository.files.values())
    assert Image.open(picture).size == (64, 64)
    assert LORA in hub.downloads

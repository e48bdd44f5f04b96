"""Files, captions and places that mean harm, or are merely unusual."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finetune.models.tiny import tiny_folder
from tests.faults.harness import digests, run, typed
from tests.tiny_copy import copy_tiny


def payload(marker: Path) -> bytes:
    """A pickle whose reading creates `marker`."""
    path = str(marker).encode()
    return b"cos\nsystem\n(Vtouch " + path + b"\ntR."


def test_the_payload_does_what_is_feared(tmp_path: Path) -> None:
    pickle.loads(payload(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


def copied(folder: Path) -> Path:
    copy_tiny(folder / "model")
    return folder / "model"


def pickled_unet(folder: Path, bad: bytes) -> dict[str, object]:
    model = copied(folder)
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(bad)
    return {"model": model}


def pickled_text_encoder(folder: Path, bad: bytes) -> dict[str, object]:
    model = copied(folder)
    (model / "text_encoder/model.safetensors").unlink()
    (model / "text_encoder/pytorch_model.bin").write_bytes(bad)
    return {"model": model}


def pickle_named_safetensors(folder: Path, bad: bytes) -> dict[str, object]:
    model = copied(folder)
    (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(bad)
    return {"model": model}


def pickled_checkpoint(folder: Path, bad: bytes) -> dict[str, object]:
    (folder / "model.ckpt").write_bytes(bad)
    return {"model": folder / "model.ckpt"}


def single_file(folder: Path, bad: bytes) -> dict[str, object]:
    (folder / "model.safetensors").write_bytes(bad)
    return {"model": folder / "model.safetensors"}


def vae(folder: Path, bad: bytes) -> dict[str, object]:
    shutil.copytree(tiny_folder() / "vae", folder / "vae")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(bad)
    return {"vae": folder / "vae"}


def lora(folder: Path, bad: bytes) -> dict[str, object]:
    (folder / "lora.safetensors").write_bytes(bad)
    return {"init_lora": folder / "lora.safetensors"}


def table(folder: Path, bad: bytes) -> dict[str, object]:
    (folder / "data").mkdir()
    (folder / "data/train.parquet").write_bytes(bad)
    return {"data": folder / "data"}


def picture(folder: Path, bad: bytes) -> dict[str, object]:
    (folder / "data").mkdir()
    (folder / "data/a.png").write_bytes(bad)
    (folder / "data/b.npy").write_bytes(bad)
    return {"data": folder / "data"}


PLACES = [
    pickled_unet, pickled_text_encoder, pickle_named_safetensors, pickled_checkpoint, single_file, vae, lora, table,
    picture,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_pickle_is_never_read(
    place: Callable[[Path, bytes], dict[str, object]], options: dict[str, object], folder: Path
) -> None:
    marker = folder / "marker"
    ended = run(typed({**options, **place(folder, payload(marker))}), folder)
    assert ended.code in (1, 2), ended.said
    assert "Traceback" not in ended.said, ended.said
    assert not marker.exists()


def test_a_pickle_in_checkpoint_or_cache_is_never_read(
    options: dict[str, object], folder: Path, straight: dict[str, str]
) -> None:
    marker = folder / "marker"
    given = typed({**options, "cache_dir": folder / "cache"})
    assert run([*given, "--max_train_minutes", "1e-6"], folder).code == 124
    for path in folder.glob("out/checkpoint-1/*.safetensors"):
        path.write_bytes(payload(marker))
    shards = list((folder / "cache").rglob("*.safetensors"))
    for path in shards:
        path.write_bytes(payload(marker))
    refused = run(given, folder)
    assert (refused.code, "checkpoint-1 is not a complete checkpoint" in refused.last_line) == (1, True)
    shutil.rmtree(folder / "out")
    refused = run(given, folder)
    assert (shards != [], refused.code) == (True, 1)
    assert "an encoding is damaged" in refused.last_line
    assert run(["cache", "verify", "--cache_dir", str(folder / "cache")], folder).code == 0
    ended = run(given, folder)
    assert ended.code == 0, ended.said
    assert not marker.exists()
    changed = {name for name, digest in digests(folder / "out").items() if straight.get(name) != digest}
    assert changed == {"config.toml"}


@pytest.mark.parametrize("part", ["unet", "scheduler", "text_encoder"])
def test_code_in_a_model_folder_is_refused_and_never_imported(
    part: str, options: dict[str, object], folder: Path
) -> None:
    model, marker = copied(folder), folder / "marker"
    for place in (model, model / part):
        (place / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nclass Mine: pass\n")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {part: ["mine", "Mine"]}))
    ended = run(typed({**options, "model": model}), folder)
    assert not marker.exists()
    assert (ended.code, "Traceback" in ended.said) == (1, False), ended.said
    assert f"model_index.json has mine.Mine as its {part}; no code of a model folder is run" in ended.last_line


@pytest.mark.parametrize("entry", ["mine.Mine", ["diffusers"], ["diffusers", "AutoencoderTiny"], 7, {"a": 1}])
def test_an_index_that_is_none_is_told_in_a_line(entry: object, options: dict[str, object], folder: Path) -> None:
    model = copied(folder)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"vae": entry}))
    ended = run(typed({**options, "model": model}), folder)
    assert (ended.code, "Traceback" in ended.said) == (1, False), ended.said
    assert "as its vae; no code of a model folder is run; expected AutoencoderKL" in ended.last_line


CAPTIONS = {
    "00": '<script>alert("x")</script><b>bold</b>',
    "01": "red \x1b[31m\x1b]0;title\x07 disc",
    "02": "a\nb\r\nc",
    "03": "disc " * 2000,
    "04": "\u202edisc\u202c \u200f",
    "05": "{caption} %s ${HOME} `id` \\",
}


@pytest.fixture
def strangely_captioned(folder: Path, make_pictures: Callable[..., Path]) -> Path:
    data = make_pictures(folder / "data", count=6)
    for name, caption in CAPTIONS.items():
        (data / f"{name}.txt").write_bytes(caption.encode())
    return data


def test_captions_of_any_kind_are_trained_and_escaped_where_they_are_shown(
    options: dict[str, object], folder: Path, strangely_captioned: Path
) -> None:
    said = [run(typed({**options, "data": strangely_captioned, "num_inference_steps": 1}), folder)]
    said.append(run(["inspect", "--run", "out", "--step", "2"], folder))
    said.append(run(["preview", "--data", str(strangely_captioned), "--output", "seen.png"], folder))
    for ended in said:
        assert ended.code == 0, ended.said
        assert not {"\x1b", "\x07", "\u202e", "\u200f"} & set(ended.said)


def blocked(note: Path) -> None:
    """Whoever opens a connection, or asks for an address, is noted, and refused."""

    def refuse(*arguments: Any, **_: Any) -> None:
        with note.open("a") as file:
            file.write(f"{arguments}\n")
        raise OSError("blocked")

    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse


def test_a_local_run_makes_no_attempt_at_the_network(words: list[str], folder: Path, straight: dict[str, str]) -> None:
    ended = run(words, folder, partial(blocked, folder / "note"))
    assert ended.code == 0, ended.said
    assert not (folder / "note").exists()
    assert digests(folder / "out") == straight


CANARY = "hf_canaryCANARYcanaryCANARYcanary1234"


def test_a_token_of_the_environment_is_in_no_file_of_a_run(options: dict[str, object], folder: Path) -> None:
    tokens = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    env = dict.fromkeys(tokens, CANARY) | {"HF_HUB_OFFLINE": "1"}
    given = typed({**options, "report_to": "tensorboard", "num_inference_steps": 1})
    ended = run(given, folder, env=env)
    assert ended.code == 0, ended.said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_an_ascii_locale_and_a_path_with_spaces_and_other_letters(
    options: dict[str, object], folder: Path, make_pictures: Callable[..., Path]
) -> None:
    """In a process of its own: the locale is read when Python starts."""
    place = folder / "zwölf große 蝶 🦋"
    data = make_pictures(place / "Bilder ü", count=6)
    (data / "00.txt").write_text("ein Schmetterling, größer als 蝶", encoding="utf-8")
    words = typed({**options, "data": data, "output_dir": "mein Läufchen", "prompt": "ein Fuß"})
    env = {**os.environ, "LC_ALL": "C"}
    command = [sys.executable, "-m", "finetune", *words]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "mein Läufchen/mein Läufchen.safetensors").is_file()

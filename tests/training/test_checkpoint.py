import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from finetune.errors import RunError
from finetune.training import checkpoint
from finetune.training.optimizers import make_optimizer


def state(step: int, optimizer: str = "adamw") -> dict:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    made = make_optimizer(optimizer, [weight], learning_rate=0.1)
    weight.square().sum().backward()
    made.step()
    return {
        "weights": {"a.weight": weight.detach().clone()},
        "optimizer": made.state_dict(),
        "ema": {"a.weight": torch.ones(2, 3)},
        "scaler": {},
        "step": step,
        "updates": step - 1,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy", "sgd"])
def test_what_is_saved_loads_the_same_without_pickle(tmp_path: Path, optimizer: str) -> None:
    saved = state(3, optimizer)
    folder = checkpoint.save(tmp_path, saved)
    assert folder.name == "checkpoint-3"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded["weights"]["a.weight"], saved["weights"]["a.weight"])
    assert torch.equal(loaded["ema"]["a.weight"], torch.ones(2, 3))
    assert loaded["step"] == 3
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    for index, slots in saved["optimizer"]["state"].items():
        for name, value in slots.items():
            other = loaded["optimizer"]["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_old_ones_go_only_after_the_new_one_stands(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [10, 100]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-100"
    assert not list(tmp_path.glob(".*"))


def test_the_one_just_saved_is_never_pruned(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(600))
    saved = checkpoint.save(tmp_path, state(550), keep=1)
    assert [path for _, path in checkpoint.checkpoints(tmp_path)] == [saved]


def test_a_limit_above_their_number_keeps_all(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, state(step), keep=6)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_what_lies_after_a_resumed_step_goes(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, state(step))
    checkpoint.discard_others(tmp_path, 10)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5, 10]


def test_a_resume_finishes_the_deletions_of_a_save_that_was_cut_off(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, state(step))
    checkpoint.discard_others(tmp_path, 15, keep=2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [10, 15]


@pytest.mark.parametrize("file", ["optimizer", "ema", "trainable"])
def test_a_checkpoint_with_a_file_missing_is_refused(tmp_path: Path, file: str) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    (folder / f"{file}.safetensors").unlink()
    with pytest.raises(RunError, match="is not a complete checkpoint"):
        checkpoint.load(folder)


def test_a_torn_save_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-6.part").mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.save(tmp_path, state(7)).is_dir()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    path = folder / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="checkpoint-1 is not a complete checkpoint: trainable"):
        checkpoint.load(folder)


def test_the_manifest_names_every_file_with_its_digest(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, told in manifest.items():
        content = (folder / name).read_bytes()
        assert told == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


FILES = ["trainable.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, file: str, harm: str) -> None:
    older = checkpoint.save(tmp_path, state(1))
    newer = checkpoint.save(tmp_path, state(2))
    path = newer / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(path.read_bytes()[:-1] if harm == "cut" else content)
    if harm == "remove":
        path.unlink()
    with pytest.raises(RunError, match=r"checkpoint-2 is not a .* checkpoint: ") as error:
        checkpoint.verify(newer)
    assert file in str(error.value)
    taken, damaged = checkpoint.newest_whole(tmp_path)
    assert taken == older
    assert damaged == [str(error.value)]


@pytest.mark.parametrize("bit", range(8))
def test_no_bit_of_the_manifest_can_flip_unnoticed(tmp_path: Path, bit: int) -> None:
    folder = checkpoint.save(tmp_path, state(1) | {"ema": {}})
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(RunError, match="checkpoint-1 is not a"):
            checkpoint.verify(folder)


def test_where_all_are_damaged_none_is_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        (checkpoint.save(tmp_path, state(step)) / "state.json").unlink()
    with pytest.raises(RunError, match=r"checkpoint-2 is .*checkpoint-1 is .*no other checkpoint"):
        checkpoint.newest_whole(tmp_path)


def test_a_file_of_somebody_else_in_a_checkpoint_is_no_damage(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    (folder / ".DS_Store").touch()
    assert checkpoint.newest_whole(tmp_path) == (folder, [])


def test_a_checkpoint_of_a_version_without_manifests_loads(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, state(3))
    (folder / "manifest.json").unlink()
    record = json.loads((folder / "state.json").read_text())
    old = {name: record[name] for name in ("step", "scaler", "optimizer", "files")}
    (folder / "state.json").write_text(json.dumps(old))
    assert checkpoint.load(folder)["updates"] == 3
    assert checkpoint.record(folder)["about"] == {}


def test_a_save_that_fails_leaves_the_older_one_and_nothing_else(tmp_path: Path) -> None:
    older = checkpoint.save(tmp_path, state(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = state(2) | {"ema": {"a": torch.ones(100_000)}}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            checkpoint.save(tmp_path, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [older]
    assert checkpoint.newest_whole(tmp_path) == (older, [])

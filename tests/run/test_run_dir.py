"""Run folders that another process holds, and what else may be meant by a path."""

import errno
import fcntl
import os
import re
from pathlib import Path
from typing import IO, Any

import portalocker
import pytest

import finetune
from finetune.config import TrainConfig, replace
from finetune.errors import UsageError
from finetune.recipe import fine_tune
from finetune.run import resume
from finetune.run.resolve_config import with_absolute_paths
from finetune.run.setup import WRITTEN
from tests.run.test_resume import CONFIG, _in_tmp, choose, held, started  # noqa: F401 # the fixture runs here too


def test_the_lock_is_one_that_nfs_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    """There an exclusive lock needs a descriptor that is open for writing."""
    lock, granted = portalocker.lock, []

    def of_nfs(file: IO[Any], flags: portalocker.LockFlags) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise portalocker.LockException(OSError(errno.EBADF, "Bad file descriptor"))
        lock(file, flags)
        granted.append(file)

    monkeypatch.setattr(portalocker, "lock", of_nfs)
    with held(choose(CONFIG)):
        assert granted
        with pytest.raises(UsageError, match="another process is training in it"), held(choose(CONFIG)):
            pass


def test_where_nothing_can_be_locked_an_option_must_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: IO[Any], flags: portalocker.LockFlags) -> None:
        raise portalocker.LockException(OSError(errno.ENOLCK, "No locks available"))

    monkeypatch.setattr(portalocker, "lock", refuse)
    with (
        pytest.raises(UsageError, match=r"cannot be locked \(.*No locks available\): .*--no_lock_output_dir"),
        held(choose(CONFIG)),
    ):
        pass
    with held(choose(CONFIG), lock=False):
        pass


def test_two_different_commands_that_start_together_take_two_numbers() -> None:
    """The first has recorded nothing yet when the second looks."""
    first = choose(CONFIG)
    with held(first):
        other = choose(replace(CONFIG, seed=1))
        assert (first.path.name, other.path.name) == ("images-tiny", "images-tiny-2")
        same = choose(CONFIG)
        with pytest.raises(UsageError, match="images-tiny: another process is training in it"), held(same):
            pass
        with pytest.raises(UsageError, match="another run has just started there"):
            choose(replace(CONFIG, seed=1, output_dir=str(first.path)))
    assert choose(replace(CONFIG, seed=1)).path == first.path


def test_a_run_folder_resumes_its_newest_checkpoint() -> None:
    path = started(CONFIG)
    again = choose(replace(CONFIG, resume_from_checkpoint=str(path)))
    assert (again.path, again.checkpoint) == (path, path / "checkpoint-5")
    assert resume.with_earlier(TrainConfig(resume_from_checkpoint=str(path))).max_train_steps == 10


def test_what_is_no_checkpoint_is_told_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "dog.safetensors").touch()
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500/random_states_0.pkl").touch()
    (tmp_path / "checkpoint-500/pytorch_lora_weights.safetensors").touch()
    for given, way in {
        "dog.safetensors": "dog.safetensors",
        "checkpoint-500": "pytorch_lora_weights.safetensors",
    }.items():
        with pytest.raises(UsageError, match=rf"resume_from_checkpoint {given}: .* give --init_lora .*{way}"):
            resume.with_earlier(TrainConfig(resume_from_checkpoint=given))


def test_names_with_brackets_find_their_own_runs() -> None:
    for name in ("cats [v1]", "cats v"):
        config = replace(CONFIG, data=(name,))
        started(config)
        started(replace(config, seed=1))
    resumed = resume._resume_folder(replace(CONFIG, data=("cats [v1]",), resume_from_checkpoint="latest"))
    assert resumed == Path("runs/cats [v1]-tiny-2")


def test_one_folder_has_one_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    names = ["data", "./data", "other/../data", str(tmp_path / "other/../data")]
    assert len({with_absolute_paths(TrainConfig(data=(name,))).data for name in names}) == 1


def test_a_longer_cosine_schedule_is_told_what_it_would_do() -> None:
    config = replace(CONFIG, lr_scheduler="cosine")
    path = started(config)
    longer = replace(config, max_train_steps=20, output_dir=str(path), resume_from_checkpoint="latest")
    ends = r"the cosine schedule of .*checkpoint-5 ends at step 10; --max_train_steps 20 would bend it"
    with pytest.raises(UsageError, match=rf"{ends}; to go on all the same: --allow_changed max_train_steps"):
        choose(longer)
    assert choose(replace(longer, allow_changed=("max_train_steps",))).checkpoint == path / "checkpoint-5"


def test_every_module_that_writes_into_a_run_folder_is_known() -> None:
    package = Path(finetune.__file__).parent
    writes = {path.stem for path in package.rglob("*.py") if re.search(r"^FILES = ", path.read_text(), re.MULTILINE)}
    (listed,) = re.findall(r"for module in \(([\w, ]+)\)", (package / "run/setup.py").read_text())
    assert writes == set(listed.split(", "))
    assert {"metrics.jsonl", "quarantine.jsonl", "samples/step-*.png", "best.safetensors"} <= set(WRITTEN)


def test_an_overwritten_run_leaves_nothing_of_the_one_before(pictures: Path, tmp_path: Path) -> None:
    basic = {"data": str(pictures), "output_dir": str(tmp_path / "out"), "train_batch_size": 1, "rank": 2}
    first = TrainConfig(
        **basic,
        max_train_steps=3,
        prompt="a disc",
        num_inference_steps=1,
        checkpointing_steps=1,
        report_to="tensorboard",
    )
    out = fine_tune(first)
    (out / "mine.txt").write_text("my own")
    before = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"validation.jsonl", "copies.jsonl", "samples/step-3.png", "out-000002.safetensors"} & before
    fine_tune(TrainConfig(**basic, max_train_steps=1, num_inference_steps=0, seed=1, overwrite_output_dir=True))
    after = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    expected = {
        *(
            "mine.txt",
            "config.toml",
            "data.json",
            "events.jsonl",
            "ledger.json",
            "quarantine.jsonl",
            "metrics.jsonl",
            "out.safetensors",
        ),
        *("pictures.jpg", "pytorch_lora_weights.safetensors", "report.html", "result.json", "timings.jsonl", ".lock"),
    }
    assert {name for name in after if not name.startswith("checkpoint-1/")} == expected
    assert (out / "mine.txt").read_text() == "my own"

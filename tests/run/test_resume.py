import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from finetune.config import ResolvedConfig, TrainConfig, load_config, load_resolved, replace
from finetune.errors import RunError, UsageError
from finetune.models.families import FAMILIES
from finetune.models.model_info import ModelInfo
from finetune.run import resume, run_dir
from finetune.run.resolve_config import resolve
from finetune.run.run_dir import occupied
from finetune.run.setup import WRITTEN
from finetune.training import checkpoint

STATE = {
    "weights": {},
    "optimizer": {"state": {}, "param_groups": []},
    "ema": {},
    "scaler": {},
    "step": 5,
    "updates": 5,
}
GIVEN = TrainConfig(model="tiny", data="images", lr_scheduler="constant", max_train_steps=10, prompt="a butterfly")


def resolved(config: TrainConfig) -> ResolvedConfig:
    found = ModelInfo("tiny", FAMILIES["tiny"], folder=Path("somewhere"), resolution=64, multiple=8)
    return resolve(config, found, pictures=6, varied_captions=False, device=torch.device("cpu"))


CONFIG = resolved(GIVEN)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def choose(config: ResolvedConfig, data: str = "digest") -> run_dir.RunDir:
    return resume.choose(config, data)


def held(folder: run_dir.RunDir, *, lock: bool = True) -> AbstractContextManager[None]:
    return occupied(folder.path, folder.mark, lock=lock)


def started(config: ResolvedConfig, finished: bool = False) -> Path:
    folder = choose(config)
    with held(folder):
        run_dir.begin(folder, config, "digest", written=WRITTEN)
    (folder.path / "metrics.jsonl").write_text("")
    checkpoint.save(folder.path, STATE)
    if finished:
        run_dir.finish(folder.path, {"steps": 10})
    return folder.path


def test_the_same_command_resumes_then_says_finished_and_another_takes_a_new_number() -> None:
    path = started(CONFIG)
    assert path == Path("runs/images-tiny")
    again = choose(CONFIG)
    assert (again.path, again.checkpoint, again.finished) == (path, path / "checkpoint-5", False)
    assert "resuming" in again.note
    run_dir.finish(path, {"steps": 10})
    assert choose(CONFIG).finished
    assert "finished" in choose(CONFIG).note
    other = replace(CONFIG, prompt="a moth")
    assert choose(other).path == Path("runs/images-tiny-2")
    started(other)
    assert choose(replace(CONFIG, seed=1)).path == Path("runs/images-tiny-3")
    assert choose(other).path == Path("runs/images-tiny-2")


def test_logging_and_workers_do_not_make_another_run() -> None:
    path = started(CONFIG)
    assert choose(replace(CONFIG, dataloader_num_workers=2, report_to=["wandb"])).path == path


def test_a_named_folder_with_another_run_or_a_model_is_refused(tmp_path: Path) -> None:
    named = replace(CONFIG, output_dir="out")
    started(named)
    with pytest.raises(
        UsageError, match=r"out holds another run \(seed: 0 -> 1\): give another --output_dir, or --over"
    ):
        choose(replace(named, seed=1))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model or somebody's files, but no run"):
        choose(replace(CONFIG, output_dir="model"))


def test_a_resume_is_only_advised_where_it_would_be_accepted() -> None:
    named = replace(CONFIG, output_dir="out")
    started(named)
    advice = "--resume_from_checkpoint latest to go on"
    with pytest.raises(UsageError, match=advice):  # longer, under a constant learning rate
        choose(replace(named, max_train_steps=20))
    with pytest.raises(
        UsageError, match=r"out holds another run \(data: the images, their names or captions\)"
    ) as caught:
        choose(named, data="one image more")
    assert advice not in str(caught.value)


def test_a_resume_that_names_nothing_means_the_run_started_last() -> None:
    with pytest.raises(UsageError, match="there is no run in runs/; give --output_dir, or --data"):
        resume.with_newest(TrainConfig(resume_from_checkpoint="latest"))
    first, second = started(CONFIG), started(replace(CONFIG, data="others"))
    os.utime(second / "data.json", (1, 1))
    newest = resume.with_earlier(resume.with_newest(TrainConfig(resume_from_checkpoint="latest", max_train_steps=20)))
    assert (newest.output_dir, newest.data, newest.prompt) == (str(first), ("images",), "a butterfly")
    assert choose(resolved(newest)).checkpoint == first / "checkpoint-5"
    elsewhere = TrainConfig(resume_from_checkpoint="latest", output_dir=str(second))
    assert resume.with_earlier(resume.with_newest(elsewhere)).data == ("others",)


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else() -> None:
    named = replace(CONFIG, output_dir="out")
    path = started(named, finished=True)
    (path / "notes.txt").write_text("mine")
    fresh = choose(replace(named, seed=1, overwrite_output_dir=True))
    assert (fresh.checkpoint, fresh.finished) == (None, False)
    assert (path / "checkpoint-5").exists()  # nothing goes before the new run has loaded
    run_dir.begin(fresh, replace(named, seed=1), "digest", written=WRITTEN)
    assert sorted(entry.name for entry in path.iterdir()) == [
        ".lock",
        "config.toml",
        "data.json",
        "notes.txt",
        "samples",
    ]
    assert load_resolved(path / "config.toml").seed == 1


def test_overwrite_never_deletes_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/model_index.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model or somebody's files, but no run"):
        choose(replace(CONFIG, output_dir="model", overwrite_output_dir=True))
    assert (tmp_path / "model/unet").is_dir()


def test_a_foreign_config_is_neither_overwritten_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "project/samples").mkdir(parents=True)
    (tmp_path / "project/config.toml").write_text("[tool]")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds a model or somebody's files, but no run"):
            choose(replace(CONFIG, output_dir="project", overwrite_output_dir=overwrite))


def test_other_pictures_or_captions_are_another_run() -> None:
    path = started(CONFIG)
    assert choose(CONFIG, "other").path == Path("runs/images-tiny-2")
    with pytest.raises(UsageError, match="the images, their names or captions"):
        choose(replace(CONFIG, output_dir=str(path), resume_from_checkpoint="latest"), "other")


def test_a_start_that_failed_does_not_occupy_the_folder() -> None:
    folder = choose(CONFIG)
    with held(folder):
        run_dir.begin(folder, CONFIG, "digest", written=WRITTEN)
    assert choose(replace(CONFIG, seed=1)).path == folder.path


def test_overwrite_applies_to_the_default_folder_and_not_to_a_resume() -> None:
    path = started(CONFIG, finished=True)
    again = choose(replace(CONFIG, overwrite_output_dir=True))
    assert (again.path, again.finished, again.overwrite) == (path, False, True)
    with pytest.raises(UsageError, match="exclude each other"):
        choose(replace(CONFIG, overwrite_output_dir=True, resume_from_checkpoint="latest"))


def test_a_resume_cannot_end_before_its_checkpoint() -> None:
    path = started(CONFIG)
    shorter = replace(CONFIG, output_dir=str(path), resume_from_checkpoint="latest", max_train_steps=4)
    with pytest.raises(UsageError, match="has done 5 already"):
        choose(shorter)


def test_a_resume_reads_its_pictures_as_before() -> None:
    started(replace(CONFIG, output_dir="out", max_bad_fraction=0.4, cache_dir="none"))
    resumed = resume.with_earlier(TrainConfig(resume_from_checkpoint="latest", output_dir="out"))
    assert (resumed.max_bad_fraction, resumed.cache_dir) == (0.4, "none")
    other = resume.with_earlier(TrainConfig(resume_from_checkpoint="latest", output_dir="out", cache_dir="elsewhere"))
    assert other.cache_dir == "elsewhere"


def test_an_explicit_resume_may_be_longer_but_not_of_other_pictures() -> None:
    path = started(replace(CONFIG, output_dir="out"))
    longer = replace(CONFIG, output_dir="out", resume_from_checkpoint="latest", max_train_steps=20)
    assert choose(longer).checkpoint == path / "checkpoint-5"
    with pytest.raises(UsageError, match="data: images -> others; seed: 0 -> 1"):
        choose(replace(longer, data="others", seed=1))
    cosine = started(replace(CONFIG, output_dir="cosine", lr_scheduler="cosine"))
    with pytest.raises(
        UsageError, match=r"--max_train_steps 20 would bend it; .* --allow_changed max_train_steps"
    ):  # would bend a cosine schedule
        choose(replace(longer, output_dir=str(cosine), lr_scheduler="cosine"))


def test_a_resume_by_path_goes_on_in_that_runs_folder_and_inherits_what_is_left_open() -> None:
    path = started(replace(CONFIG, output_dir="out", learning_rate=3e-4, rank=8))
    config = TrainConfig(model="tiny", data="images", prompt="a butterfly", max_train_steps=20,
                         resume_from_checkpoint=str(path / "checkpoint-5"))  # fmt: skip
    inherited = resume.with_earlier(config)
    assert (inherited.learning_rate, inherited.rank, inherited.max_train_steps) == (3e-4, 8, 20)
    assert choose(resolved(inherited)).path.resolve() == path.resolve()


def test_latest_without_any_checkpoint_starts_from_the_beginning_and_says_so() -> None:
    found = choose(replace(CONFIG, output_dir="new", resume_from_checkpoint="latest"))
    assert found.checkpoint is None
    assert "from the beginning" in found.note


def test_a_path_that_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(UsageError, match="nowhere: no checkpoint of a run"):
        choose(replace(CONFIG, resume_from_checkpoint="nowhere"))
    with pytest.raises(UsageError, match="nowhere: no checkpoint of a run"):  # before other options are looked at
        resume.with_earlier(replace(GIVEN, resume_from_checkpoint="nowhere"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = replace(CONFIG, output_dir="file/out")
    with pytest.raises(UsageError, match="file/out cannot be written"), held(choose(config)):
        pass


def test_the_recorded_config_repeats_the_run() -> None:
    path = started(replace(CONFIG, overwrite_output_dir=True))
    assert load_resolved(path / "config.toml") == CONFIG
    repeated = load_config(path / "config.toml")
    assert repeated == replace(GIVEN, overwrite_output_dir=False)
    assert repeated.given == GIVEN.given  # what the run had derived is derived anew


def test_a_resume_without_a_checkpoint_neither_trains_a_finished_run_anew_nor_replaces_a_model(tmp_path: Path) -> None:
    path = started(replace(CONFIG, output_dir="out"), finished=True)
    shutil.rmtree(path / "checkpoint-5")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    for folder in ("out", "model"):
        with pytest.raises(UsageError, match=f"{folder} holds a finished run or a model, but no checkpoint"):
            choose(replace(CONFIG, output_dir=folder, resume_from_checkpoint="latest"))


def test_overwriting_leaves_what_no_run_wrote(tmp_path: Path) -> None:
    path = started(replace(CONFIG, output_dir="out"), finished=True)
    mine = [path / "logs/mine.txt", path / "checkpoint-mine/a", path / ".mine.part", path / "samples/mine.png"]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    again = choose(replace(CONFIG, output_dir="out", overwrite_output_dir=True))
    run_dir.begin(again, CONFIG, "digest", written=WRITTEN)
    assert all(file.exists() for file in mine)
    assert not (path / "checkpoint-5").exists()
    assert not (path / "metrics.jsonl").exists()


def test_a_run_may_not_lie_among_its_own_pictures(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="output_dir images/out lies inside --data images: its images would be"):
        choose(replace(CONFIG, output_dir="images/out"))
    with pytest.raises(UsageError, match="lies inside --data"):
        choose(replace(CONFIG, data=str(tmp_path)))


def test_a_damaged_record_of_the_pictures_is_another_run() -> None:
    path = started(CONFIG)
    (path / "data.json").write_text("")
    assert choose(CONFIG).path == Path("runs/images-tiny-2")


STATES = ("new", "unfinished", "finished", "another run", "taken")


def make(state: str, path: Path) -> None:
    """Bring a folder into a state, as seen by CONFIG."""
    if state == "taken":
        path.mkdir(parents=True)
        (path / "model_index.json").write_text("{}")
    elif state != "new":
        config = replace(CONFIG, output_dir=str(path), **({"seed": 1} if state == "another run" else {}))
        started(config, finished=state == "finished")


def done(path: Path, **way: object) -> str:
    """What the command does with the folder, by the table's words."""
    try:
        found = choose(replace(CONFIG, **way))
    except UsageError:
        return "refuse"
    if found.path.resolve() != path.resolve():
        return "next number"
    return (
        "say finished" if found.finished else "replace" if found.overwrite else "go on" if found.checkpoint else "start"
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("by default", {}),
        ("by default, overwrite", {"overwrite_output_dir": True}),
        ("by name", {"output_dir": "runs/images-tiny"}),
        ("by name, overwrite", {"output_dir": "runs/images-tiny", "overwrite_output_dir": True}),
        ("resume latest", {"output_dir": "runs/images-tiny", "resume_from_checkpoint": "latest"}),
        ("resume a checkpoint", {"resume_from_checkpoint": "runs/images-tiny/checkpoint-5"}),
    ],
)
def test_every_cell_of_the_table_is_what_happens(way: str, options: dict, state: str) -> None:
    path = Path("runs/images-tiny")
    make(state, path)
    assert done(path, **options) == resume.decide(way, state)


def test_a_run_whose_first_checkpoint_was_never_written_starts_over() -> None:
    path = started(CONFIG)
    shutil.rmtree(path / "checkpoint-5")
    again = choose(CONFIG)
    assert (again.path, again.checkpoint) == (path, None)
    assert "no checkpoint yet, starting from the beginning" in again.note


def test_a_precision_that_the_machine_chose_makes_no_other_run_and_is_told() -> None:
    path = started(CONFIG)
    elsewhere = replace(CONFIG, mixed_precision="bf16")
    again = choose(elsewhere)
    assert (again.path, again.checkpoint) == (path, path / "checkpoint-5")
    assert "mixed_precision: no -> bf16" in again.note
    assert "mixed_precision" not in choose(CONFIG).note
    way = replace(elsewhere, elsewhere.given | {"mixed_precision"})
    assert choose(way).path == Path("runs/images-tiny-2")


def test_a_damaged_checkpoint_is_skipped_and_named_and_all_damaged_are_an_error() -> None:
    path = started(CONFIG)
    (checkpoint.save(path, STATE | {"step": 7}) / "state.json").write_text("{")
    latest = replace(CONFIG, resume_from_checkpoint="latest")
    for config in (CONFIG, latest):
        chosen = choose(config)
        assert (chosen.checkpoint, chosen.step) == (path / "checkpoint-5", 5)
        skipped, resuming = chosen.note.splitlines()
        assert skipped.startswith(f"skipped: {path / 'checkpoint-7'} is not a")
        assert resuming == f"resuming {path / 'checkpoint-5'}"
    with pytest.raises(RunError, match="checkpoint-7 is not a readable checkpoint"):
        choose(replace(CONFIG, resume_from_checkpoint=str(path / "checkpoint-7")))
    (path / "checkpoint-5/state.json").write_text("{")
    for config in (CONFIG, latest):
        with pytest.raises(RunError, match="there is no other checkpoint to resume from"):
            choose(config)


def test_what_may_have_changed_is_an_option_of_a_run_that_is_resumed() -> None:
    with pytest.raises(UsageError, match="allow_changed is for a run that is resumed"):
        choose(replace(CONFIG, allow_changed=["seed"]))
    with pytest.raises(UsageError, match=r"allow_changed sed: no such option; did you mean seed?"):
        choose(replace(CONFIG, allow_changed=["sed"], resume_from_checkpoint="latest"))
    path = started(CONFIG)
    other = replace(CONFIG, seed=1, resume_from_checkpoint="latest")
    assert choose(replace(other, allow_changed=["seed", "data"]), "other images").checkpoint == path / "checkpoint-5"


def test_a_folder_is_called_after_its_pictures_of_many_sources_after_the_first() -> None:
    assert run_dir.name_of(["/a/dog", "cats/"]) == "dog+cats"
    assert run_dir.name_of(["/a/shards/*.tar"]) == "shards"
    assert run_dir.name_of([f"shards/{number}.tar" for number in range(1000)]) == "0.tar+999-more"
    assert run_dir.name_of([]) == "dataset"


def test_a_resume_reports_where_the_run_did_and_publishes_nothing() -> None:
    path = started(replace(CONFIG, output_dir="out", report_to=("tensorboard",), push_to_hub=True))
    config = TrainConfig(model="tiny", data="images", prompt="a butterfly", resume_from_checkpoint=str(path))
    inherited = resume.with_earlier(config)
    assert (inherited.report_to, inherited.push_to_hub) == (("tensorboard",), False)

"""The decision table for run folders: start, resume, take the next number, or refuse."""

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from finetune.atomic_io import is_inside
from finetune.config import ResolvedConfig, TrainConfig, as_dict, load_resolved, replace, suggest
from finetune.errors import UsageError
from finetune.option_info import info_of_field
from finetune.options import SECTIONS, option_info
from finetune.run.run_dir import (
    RunDir,
    default_folder,
    has_trained,
    held_by_another,
    holds_a_model,
    is_data_of,
    is_run,
)
from finetune.seeding import fold
from finetune.training.checkpoint import latest, newest_whole, record, verify

FolderState = Literal["new", "unfinished", "finished", "another run", "taken"]
"""What is in a folder: nothing that matters; this run, to be gone on with or ended; another run; a model or somebody
else's files."""

Action = Literal["start", "go on", "say finished", "replace", "next number", "refuse"]

DECISIONS: dict[str, tuple[Action, Action, Action, Action, Action]] = {
    # asked for, and found:     new       unfinished  finished        another run    taken
    "by default":             ("start",  "go on",    "say finished", "next number", "next number"),
    "by default, overwrite":  ("start",  "replace",  "replace",      "replace",     "next number"),
    "by name":                ("start",  "go on",    "say finished", "refuse",      "refuse"),
    "by name, overwrite":     ("start",  "replace",  "replace",      "replace",     "refuse"),
    "resume latest":          ("start",  "go on",    "say finished", "refuse",      "refuse"),
    "resume a checkpoint":    ("refuse", "go on",    "go on",        "refuse",      "refuse"),
}  # fmt: skip
"""What a command does, for each way in which it asks for a folder (the rows) and each `FolderState` that it finds."""


def choose(config: ResolvedConfig, data: str) -> RunDir:
    """The folder of this run.

    Args:
        config: what is to be run.
        data: digest of the pictures, their names and captions.

    Raises:
        UsageError: the folder asked for holds something else, or lies among the pictures, or the run to be resumed
            differs, or cannot end where it is asked to.
        RunError: the checkpoint to be resumed is damaged, or all are.
    """
    _check_allowed(config)
    mark = _mark(config, data)
    for request, path, checkpoint in _candidates(config):
        state, reason = (_state_to_resume if "resume" in request else _state)(path, checkpoint, config, data)
        if state == "new" and held_by_another(path, mark):
            state, reason = "taken", f"output_dir {path}: another run has just started there"
        action = decide(request, state)
        if action == "refuse":
            raise UsageError(reason)
        if action == "go on" and checkpoint is not None:
            return dataclasses.replace(_resumed(request, path, checkpoint, config), mark=mark)
        if action != "next number":
            return dataclasses.replace(_folder(action, request, path, config), mark=mark)
    raise AssertionError("numbers do not end")


def decide(request: str, state: FolderState) -> Action:
    """What the table says."""
    return DECISIONS[request][typing.get_args(FolderState).index(state)]


def _candidates(config: ResolvedConfig) -> Iterator[tuple[str, Path, Path | None]]:
    """The folders that a command may mean: how each is asked for, its path, and the checkpoint to go on from."""
    if (resume := config.resume_from_checkpoint) is not None:
        if config.overwrite_output_dir:
            raise UsageError("overwrite_output_dir and resume_from_checkpoint exclude each other")
        path, newest = _resume_folder(config), _means_newest(resume)
        yield f"resume {'latest' if newest else 'a checkpoint'}", path, latest(path) if newest else Path(resume)
        return
    base = Path(config.output_dir or default_folder(config))
    request = f"by {'name' if config.output_dir else 'default'}{', overwrite' * config.overwrite_output_dir}"
    yield request, base, latest(base)
    for number in itertools.count(2):
        path = base.with_name(f"{base.name}-{number}")
        yield "by default", path, latest(path)


def _check_allowed(config: ResolvedConfig) -> None:
    """Raise UsageError where `--allow_changed` can do nothing."""
    if config.allow_changed and config.resume_from_checkpoint is None:
        raise UsageError("allow_changed is for a run that is resumed: give --resume_from_checkpoint latest")
    if unknown := [name for name in config.allow_changed if name not in option_info()]:
        raise UsageError(f"allow_changed {unknown[0]}: no such option{suggest(unknown[0], option_info())}")


def _resumed(request: str, path: Path, checkpoint: Path, config: ResolvedConfig) -> RunDir:
    """A folder to go on in, from the checkpoint that was named, or from the newest that is whole."""
    damaged: list[str] = []
    if request == "resume a checkpoint":
        verify(checkpoint)
    else:
        newest, damaged = newest_whole(path)
        checkpoint = newest or checkpoint
    lines = [*(f"skipped: {what}" for what in damaged), f"resuming {checkpoint}{_on_another_machine(path, config)}"]
    state = record(checkpoint)
    return RunDir(path, checkpoint, state["step"], state["about"], note="\n".join(lines))


def _folder(action: Action, request: str, path: Path, config: ResolvedConfig) -> RunDir:
    """A folder to start in, with what is to be said about it. Raises UsageError for a start among the pictures."""
    containing = [source for source in config.data if is_inside(path, Path(source))]
    if action != "say finished" and containing:
        raise UsageError(
            f"output_dir {path} lies inside --data {containing[0]}: its images would be trained on next time; "
            "give an --output_dir elsewhere"
        )
    note = ""
    if action == "say finished":
        how = "give more --max_train_steps to go on" if "resume" in request else "change an option to start another"
        note = f"{path}: this run is finished; {how}"
    elif action == "go on" or request == "resume latest":
        note = f"{path}: no checkpoint {'yet' if action == 'go on' else 'found'}, starting from the beginning"
    return RunDir(path, finished=action == "say finished", note=note, overwrite=action == "replace")


def _on_another_machine(path: Path, config: ResolvedConfig) -> str:
    """What this machine decides otherwise than the one on which the run began, should it differ."""
    earlier, now = as_dict(load_resolved(path / "config.toml")), as_dict(config)
    machine = [name for name, info in option_info().items() if info.affects == "machine"]
    changed = [f"{name}: {earlier[name]} -> {now[name]}" for name in machine if earlier[name] != now[name]]
    return f" ({'; '.join(changed)}: from here on its bits are this machine's)" if changed else ""


def _state(path: Path, checkpoint: Path | None, config: ResolvedConfig, data: str) -> tuple[FolderState, str]:
    """What is in a folder, and why it cannot be had, should the table say so."""
    if not is_run(path):
        foreign = (path / "config.toml").exists() and not (path / "data.json").exists()
        reason = f"output_dir {path} holds a model or somebody's files, but no run: give another --output_dir"
        return ("taken" if foreign or holds_a_model(path) or has_trained(path) else "new"), reason
    if changed := _changes(path, config, data):
        resumable = checkpoint is not None and not _changes(path, config, data, resumed=True)
        go_on = ", --resume_from_checkpoint latest to go on with it" if resumable else ""
        reason = f"output_dir {path} holds another run ({'; '.join(changed)})"
        return "another run", f"{reason}: give another --output_dir{go_on}, or --overwrite_output_dir to delete it"
    return ("finished" if (path / "result.json").exists() else "unfinished"), ""


def _state_to_resume(path: Path, checkpoint: Path | None, config: ResolvedConfig, data: str) -> tuple[FolderState, str]:
    """Return what is in a folder that `--resume_from_checkpoint` names, where more options may differ."""
    if checkpoint is None:
        nothing = f"resume_from_checkpoint latest: {path} holds a finished run or a model, but no checkpoint"
        return ("taken" if holds_a_model(path) else "new"), nothing
    if not (checkpoint / "state.json").is_file() or not is_run(path):
        return "taken", f"resume_from_checkpoint {checkpoint}: no checkpoint of a run in {path}"
    earlier = load_resolved(path / "config.toml")
    if changed := _changes(path, config, data, resumed=True):
        if [change.split(":")[0] for change in changed] == ["max_train_steps"]:
            ends = f"the {earlier.lr_scheduler} schedule of {checkpoint} ends at step {earlier.max_train_steps}"
            longer = f"--max_train_steps {config.max_train_steps} would bend it"
            return "another run", f"{ends}; {longer}; to go on all the same: --allow_changed max_train_steps"
        other = f"{checkpoint} belongs to a run with other options: {'; '.join(changed)}"
        return "another run", f"{other}; --allow_changed goes on all the same with those that it names"
    if earlier.optimizer != config.optimizer:
        other = f"optimizer: {earlier.optimizer} -> {config.optimizer}"
        return "another run", f"{other}: no optimizer can take over another one's moments; begin with --init_lora"
    number = checkpoint.name.rpartition("-")[2]
    if config.max_train_steps < (done := int(number) if number.isdigit() else 0):
        return "another run", f"max_train_steps = {config.max_train_steps}: {checkpoint} has done {done} already"
    ended = earlier.max_train_steps == config.max_train_steps and (path / "result.json").exists()
    return ("finished" if ended else "unfinished"), ""


def with_newest(config: TrainConfig) -> TrainConfig:
    """A resume that names neither pictures nor a folder means the run in runs/ that was started last.

    Raises:
        UsageError: there is none.
    """
    if config.resume_from_checkpoint != "latest" or config.data or config.output_dir is not None:
        return config
    records = list(Path("runs").glob("*/data.json"))
    if not records:
        raise UsageError("resume_from_checkpoint latest: there is no run in runs/; give --output_dir, or --data")
    newest = max(records, key=lambda record: record.stat().st_mtime)
    return replace(config, output_dir=str(newest.parent))


def with_earlier(config: TrainConfig) -> TrainConfig:
    """A resumed run takes what is not given from the earlier part of the run, but for a length if one is given.

    Raises:
        UsageError: a path that is no checkpoint.
    """
    if config.resume_from_checkpoint is None:
        return config
    path = _resume_folder(config)
    resume = config.resume_from_checkpoint
    if not _means_newest(resume) and not (Path(resume) / "state.json").is_file():
        raise UsageError(_no_checkpoint(Path(resume), path))
    recorded = path / "config.toml"
    if not recorded.exists():
        return config
    earlier = load_resolved(recorded)
    lengths = {name for name, info in option_info().items() if info.affects == "length"}
    given = config.given | (lengths if config.given & lengths else set())
    free = {field.name: info_of_field(field) for field in fields(SECTIONS["output"])}
    given |= {name for name, info in free.items() if info.affects == "free" and not info.inherited}
    inherited = {name: value for name, value in as_dict(earlier).items() if name not in given}
    return replace(config, config.given | (earlier.given - given), **inherited)


def _means_newest(resume: str) -> bool:
    """Whether `--resume_from_checkpoint` means the newest checkpoint: by the word, or by a run folder's path."""
    return resume == "latest" or (Path(resume) / "data.json").is_file()


def _no_checkpoint(given: Path, run: Path) -> str:
    """What is wrong with a path that is no checkpoint, and where it belongs."""
    option = f"resume_from_checkpoint {given}"
    if given.suffix in (".safetensors", ".pt", ".bin", ".ckpt"):
        return (
            f"{option}: a file of weights holds no optimizer and no step; to go on from a LoRA give --init_lora {given}"
        )
    if (given / "optimizer.bin").exists() or list(given.glob("random_states_*.pkl")):
        lora = next(iter(sorted(given.glob("*.safetensors"))), given)
        return (
            f"{option}: a checkpoint of accelerate, which is not read; to go on from its LoRA give --init_lora {lora}"
        )
    return f"{option}: no checkpoint of a run in {run}"


def _resume_folder(config: TrainConfig) -> Path:
    """The run folder that `--resume_from_checkpoint` means."""
    resume = str(config.resume_from_checkpoint)
    if resume != "latest" and _means_newest(resume):
        return Path(resume)
    if config.output_dir is not None:
        return Path(config.output_dir)
    if resume != "latest":
        return Path(resume).absolute().parent
    base = default_folder(config)
    there = base.parent.iterdir() if base.parent.is_dir() else ()  # no glob: a name may hold brackets
    matches = [(re.fullmatch(rf"{re.escape(base.name)}-(\d+)", path.name), path) for path in there]
    return max([(int(match[1]), path) for match, path in matches if match], default=(0, base))[1]


def _mark(config: ResolvedConfig, data: str) -> str:
    """What tells a run from others before it has recorded anything."""
    options, values = option_info(), as_dict(config)
    decisive = [f"{name} {values[name]}" for name in options if options[name].affects in ("another run", "length")]
    return f"{fold(*decisive, data):016x}\n"


def differences(a: ResolvedConfig, b: ResolvedConfig, *, resumed: bool = False) -> list[str]:
    """ "option: old -> new" for each option that makes b another run than a; fewer do when a is resumed by name."""
    free = {"free"} | ({"on resume"} if resumed else set())
    if resumed and b.lr_scheduler == "constant":  # any other schedule would be bent by another length
        free.add("length")
    mine, theirs = as_dict(a), as_dict(b)
    return [
        f"{name}: {_formatted(mine[name])} -> {_formatted(theirs[name])}"
        for name, info in option_info().items()
        if info.affects not in free | ({"machine"} if name not in b.given else set())
        and mine[name] != theirs[name]
        and not (resumed and name in b.allow_changed)
    ]


def _formatted(value: Any) -> Any:
    """A value of an option for people, a list as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _changes(path: Path, config: ResolvedConfig, data: str, *, resumed: bool = False) -> list[str]:
    """What makes this another run than the one in the folder."""
    changed = differences(load_resolved(path / "config.toml"), config, resumed=resumed)
    same = is_data_of(path, data) or (resumed and "data" in config.allow_changed)
    return changed + ([] if same else ["data: the images, their names or captions"])

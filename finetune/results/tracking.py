"""Metrics: metrics.jsonl and timings.jsonl always, trackers through accelerate."""

import importlib.util
import json
import logging
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import isfinite, nan
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

import numpy
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from finetune.atomic_io import json_lines, write_whole
from finetune.errors import UsageError
from finetune.log_handlers import labelled
from finetune.training.metrics import Fault, StepMetrics

_log = logging.getLogger(__name__)

METRICS, TIMINGS, FAULTS = "metrics.jsonl", "timings.jsonl", "faults.jsonl"
TRACKED = "run-id.txt"
VALIDATION, FORGETTING, COPIES = "validation.jsonl", "forgetting.jsonl", "copies.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""What evaluators record that have no file of their own."""
LINES_OF_STEPS = (METRICS, TIMINGS, FAULTS, VALIDATION, FORGETTING, COPIES, EVALUATIONS)
"""Files of lines that a run which goes on from an earlier step cuts off after that."""
FILES = (*LINES_OF_STEPS, f"logs/{TRACKED}", "logs/**/events.out.tfevents.*", "logs/**/hparams.yml")
"""Patterns of what is written into a run folder here."""


class Log:
    """Appends a line per step to two files.

    `metrics.jsonl` holds only what the run determines, so that two equal runs write equal files; `timings.jsonl`
    what the machine determines.
    """

    def __init__(self, metrics: TextIO, timings: TextIO):
        self._metrics, self._timings = metrics, timings

    def write(self, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        """Log, and answer, a step: its metrics, seconds since the last, images per second and peak memory in GB."""
        timing = {
            "step": metrics.step,
            "seconds": round(seconds, 4),
            "images_per_second": round(metrics.examples / seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }
        for file, record in ((self._metrics, metrics.as_dict()), (self._timings, timing)):
            file.write(json.dumps(record) + "\n")
        return metrics.as_dict() | timing


@contextmanager
def log(folder: Path, step: int) -> Iterator[Log]:
    """Open the log of a run folder, whose files hold each line as soon as it is written.

    Args:
        folder: the run folder.
        step: steps already done; later lines of an interrupted run are cut off.
    """
    for name in LINES_OF_STEPS:
        _cut(folder / name, step)
    with _appended(folder / METRICS) as metrics, _appended(folder / TIMINGS) as timings:
        yield Log(metrics, timings)


def _appended(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", buffering=1)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines. One that a killed process has cut off is taken out before."""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            cut_off = file.read() != b"\n"
        if cut_off:
            _cut(path, sys.maxsize)
    with _appended(path) as file:
        file.write(json.dumps(record) + "\n")


def note_seconds(folder: Path, step: int, what: str, seconds: float) -> None:
    """Record in timings.jsonl how long something else than a step has taken: a "grid", a "validation"."""
    with _appended(folder / TIMINGS) as file:
        file.write(json.dumps({"step": step, f"{what}_seconds": round(seconds, 4)}) + "\n")


def note_fault(folder: Path, fault: Fault, facts: Sequence[Mapping[str, Any]]) -> None:
    """Record in faults.jsonl a step that was not finite.

    Args:
        folder: of the run.
        fault: what was wrong.
        facts: what is known of each of its examples.
    """
    plain = {"step": fault.step, "loss": _number(fault.loss), "grad_norm": _number(fault.grad_norm)}
    examples = [{**fact, "loss": _number(loss)} for fact, loss in zip(facts, fault.losses, strict=True)]
    with _appended(folder / FAULTS) as file:
        file.write(json.dumps(plain | {"examples": examples}, ensure_ascii=False) + "\n")


def _number(value: float) -> float | str:
    """As JSON can say it: "nan", "inf" and "-inf" as text."""
    return value if isfinite(value) else str(value)


def timings(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of timings.jsonl."""
    return json_lines(folder / TIMINGS)


def _cut(path: Path, step: int) -> None:
    """Keep the lines of steps 1 to `step`."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:  # `splitlines` would also part them at U+2028, which a name may hold
        complete = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(complete))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): reserved on the GPU where there is one, else resident.

    What CUDA graphs work in counts as reserved only. Recording one starts the peak again.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Progress:
    """Steps done, loss, learning rate, speed, memory and time left: as a bar, or without a terminal as lines.

    Args:
        bar: disabled where there is no terminal.
        total: steps of the run.
        pause: seconds between two lines.
    """

    def __init__(self, bar: tqdm, total: int, pause: float):
        self._bar, self._total, self._pause = bar, total, pause
        self._loss: float | None = None
        self._seconds: float | None = None
        self._logged = time.monotonic()
        self.left = 0.0
        """Seconds that the steps to come will take."""

    def show(self, metrics: StepMetrics, seconds: float) -> None:
        """Advance by one step that took so many seconds; loss and speed are smoothed over about 20 steps."""
        if metrics.fault is None:
            self._loss = _smoothed(self._loss, metrics.loss)
        self._seconds = _smoothed(self._seconds, seconds)
        self.left = (self._total - metrics.step) * self._seconds
        values = {
            "loss": nan if self._loss is None else self._loss,
            "lr": metrics.lr,
            "images_per_second": metrics.examples / self._seconds,
            "memory_gb": peak_memory_gb(),
            "seconds_left": round(self.left),
        }
        text = "loss {loss:.4f}, lr {lr:.2g}, {images_per_second:.3g} images/s, {memory_gb:.1f} GB".format(**values)
        left = f"{timedelta(seconds=values['seconds_left'])} left"
        self._bar.set_description_str(f"{text.replace('images/s', 'img/s')}, {left}", refresh=False)
        self._bar.update()
        last = metrics.step == self._total
        if self._bar.disable and (last or time.monotonic() - self._logged >= self._pause):
            self._logged = time.monotonic()
            message = f"step {metrics.step} of {self._total}: {text}{'' if last else f', {left}'}"
            _log.info(message, extra=labelled("", step=metrics.step, steps=self._total, **values))

    def resume(self) -> None:
        """What was done since the last step (a grid, a checkpoint) does not count into the time of the next."""
        self._bar.unpause()


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + 0.05 * (now - before)


@contextmanager
def progress(done: int, total: int, pause: float = 30) -> Iterator[Progress]:
    """Progress from `done` to `total` steps."""
    # With disable=None a bar is only drawn on a terminal, or in a notebook.
    form = "{n_fmt}/{total_fmt} {bar} {desc}"
    with tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None, bar_format=form) as bar:
        yield Progress(bar, total, pause)


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise UsageError for a tracker that is not installed (accelerate only leaves it out) or has no login.

    On a terminal Weights & Biases asks for its key here, before anything is computed.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to {name} needs a package: pip install 'finetune-unet[trackers]'")
    if "wandb" in trackers:
        wandb = importlib.import_module("wandb")
        try:
            wandb.login(verify=False)  # the key is tried when the run is opened: the network may be slow
        except wandb.errors.Error as error:
            raise UsageError(
                f"report_to wandb: {str(error).splitlines()[0]} (or set WANDB_API_KEY, or WANDB_MODE=offline)"
            ) from error


def tracked_run(folder: Path, *, resumed: bool) -> str:
    """The id of a run, by which trackers continue its curves: kept in `logs/`; another one where the run is new."""
    record = folder / "logs" / TRACKED
    if not (resumed and record.is_file()):
        record.parent.mkdir(exist_ok=True)
        name = re.sub(r"[^\w-]", "-", folder.name)[:100]  # Weights & Biases allows no / \\ # ? % : in an id
        write_whole(record, f"{name}-{uuid4().hex[:8]}\n")
    return record.read_text(encoding="utf-8").strip()


def start_trackers(
    accelerator: Accelerator, folder: Path, project: str | None, settings: Mapping[str, Any], *, resumed: bool
) -> None:
    """Open the trackers that the Accelerator was made with, their files in `logs/` of the run folder.

    Args:
        accelerator: made with `log_with`.
        folder: the run folder, whose name is the run's.
        project: holds the runs that are looked at together; None: WANDB_PROJECT of the environment, else finetune-unet.
        settings: of the run; those that trackers cannot hold become text.
        resumed: the curves go on; False: they are new.
    """
    if not accelerator.log_with:
        return
    run = tracked_run(folder, resumed=resumed)
    logs = str(folder / "logs")
    openings = {
        "wandb": {"name": folder.name, "id": run, "resume": "allow", "dir": logs},
        "trackio": {"name": run, "resume": "allow"},  # which knows a run by its name alone
    }
    plain = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in settings.items()
    }
    accelerator.project_configuration.logging_dir = logs
    project = project or os.environ.get("WANDB_PROJECT") or "finetune-unet"
    accelerator.init_trackers(project, config=plain, init_kwargs=openings)


def track(accelerator: Accelerator, metrics: StepMetrics) -> None:
    """Send a step's metrics to the open trackers."""
    values = {name: value for name, value in metrics.as_dict().items() if name != "step"}
    accelerator.log({f"train/{name}": value for name, value in values.items()}, step=metrics.step)


def track_pictures(accelerator: Accelerator, step: int, path: Path) -> None:
    """Send a sample grid to the open trackers that show pictures."""
    picture = numpy.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture}, step=step, **layout)

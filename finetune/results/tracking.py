"""What a run reports of itself: metrics.jsonl and timings.jsonl always, trackers through accelerate."""

import importlib.util
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from finetune.errors import UsageError
from finetune.files import write_whole
from finetune.training.trainer import StepMetrics


class Log:
    """Appends a line per step to two files in the run folder.

    `metrics.jsonl` holds only what the run determines, so that two equal runs write equal files; `timings.jsonl`
    what the machine determines.

    Args:
        folder: the run folder.
        step: steps already done; later lines of an interrupted run are cut off.
    """

    def __init__(self, folder: Path, step: int):
        self._metrics, self._timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        for path in (self._metrics, self._timings):
            _cut(path, step)

    def write(self, metrics: StepMetrics, seconds: float) -> None:
        """Log one step: its metrics, the seconds since the last, images per second and peak memory in GB."""
        timing = {
            "step": metrics.step,
            "seconds": round(seconds, 4),
            "images_per_second": round(metrics.examples / seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }
        for path, record in ((self._metrics, asdict(metrics)), (self._timings, timing)):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _cut(path: Path, step: int) -> None:
    """Keep the lines of steps 1 to `step`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(whole))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class ProgressBar:
    """tqdm with the smoothed loss, seconds per step, images per second and peak memory beside the time left."""

    def __init__(self, bar: tqdm):
        self._bar = bar
        self._loss: float | None = None

    def show(self, metrics: StepMetrics, seconds: float) -> None:
        """Advance by one step; the loss is smoothed over about 20 steps."""
        self._loss = metrics.loss if self._loss is None else self._loss + 0.05 * (metrics.loss - self._loss)
        self._bar.set_postfix_str(
            f"loss {self._loss:.4f}, {seconds:.2f} s/step, {metrics.examples / seconds:.1f} images/s, "
            f"{peak_memory_gb():.1f} GB",
            refresh=False,
        )
        self._bar.update()


@contextmanager
def progress_bar(done: int, total: int) -> Iterator[ProgressBar]:
    """A bar from `done` to `total` steps."""
    with tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) as bar:
        yield ProgressBar(bar)


def check_installed(trackers: Sequence[str]) -> None:
    """Raise UsageError for a tracker whose package is not installed; accelerate would only leave it out."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"report_to {name} needs a package: pip install 'finetune-unet[trackers]'")


def start_trackers(accelerator: Accelerator, folder: Path, settings: Mapping[str, Any]) -> None:
    """Open the trackers that the Accelerator was made with, under the run folder's name, their files in its `logs/`.

    Settings that trackers cannot hold become text.
    """
    plain = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in settings.items()
    }
    accelerator.project_configuration.logging_dir = str(folder / "logs")
    accelerator.init_trackers(folder.name, config=plain)


def track(accelerator: Accelerator, metrics: StepMetrics) -> None:
    """Send a step's metrics to the open trackers."""
    values = asdict(metrics)
    accelerator.log(values, step=values.pop("step"))


def track_pictures(accelerator: Accelerator, step: int, path: Path) -> None:
    """Send a sample grid to the open trackers that show pictures."""
    picture = numpy.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture}, step=step, **layout)

"""Trackers (TensorBoard, Weights & Biases, trackio) through accelerate."""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy
from accelerate import Accelerator
from PIL import Image

from finetune.atomic_io import write_whole
from finetune.errors import UsageError
from finetune.training.metrics import StepMetrics

RUN_ID = "run-id.txt"
FILES = (f"logs/{RUN_ID}", "logs/**/events.out.tfevents.*", "logs/**/hparams.yml")
"""Patterns of what is written into a run folder here."""


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


def tracker_run_id(folder: Path, *, resumed: bool) -> str:
    """The id of a run, by which trackers continue its curves: kept in `logs/`; another one where the run is new."""
    record = folder / "logs" / RUN_ID
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
    run = tracker_run_id(folder, resumed=resumed)
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


def log_metrics(accelerator: Accelerator, metrics: StepMetrics) -> None:
    """Send a step's metrics to the open trackers."""
    values = {name: value for name, value in metrics.as_dict().items() if name != "step"}
    accelerator.log({f"train/{name}": value for name, value in values.items()}, step=metrics.step)


def log_images(accelerator: Accelerator, step: int, path: Path) -> None:
    """Send a sample grid to the open trackers that show pictures."""
    picture = numpy.asarray(Image.open(path).convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture}, step=step, **layout)

"""Evaluators: what a run measures or draws while training pauses, when, and where it is recorded.

Validation, forgetting, sample grids and memorization are four of them. A fifth is a class that is called with the
`Run`, for `fine_tune(..., evaluators=[...])`.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from finetune.atomic_io import json_lines, write_json_lines
from finetune.config import ResolvedConfig
from finetune.log_handlers import labelled
from finetune.results import metrics_log, trackers
from finetune.results.events import Events

_log = logging.getLogger(__name__)

FIRST_STEPS = 6
"""Steps of training that suffice to know how long one takes."""


class Evaluator(Protocol):
    """Something that the main process measures or draws between two steps of training."""

    def should_run(self, step: int) -> bool:
        """Whether training pauses for it after this step; True for the last step of the run."""
        ...

    def run(self, step: int) -> None:
        """Measure the model as it is after `step` steps, and record it.

        A resumed run calls this again for steps whose results are recorded already.
        """
        ...


class EvaluationLog:
    """Records what evaluators measure: a line in a file, an event, values in the trackers, and a printed line.

    Args:
        folder: of the run.
        events: of the run.
        accelerator: an `accelerate.Accelerator`, which holds the open trackers.
    """

    def __init__(self, folder: Path, events: Events, accelerator: Any):
        self.folder, self._events, self._accelerator = folder, events, accelerator

    def lines(self, file: str) -> list[dict[str, Any]]:
        """Return the lines of a file of the run folder, in the order of their steps."""
        return json_lines(self.folder / file)

    def write(
        self,
        name: str,
        record: Mapping[str, Any],
        *,
        tracked: Mapping[str, float],
        message: str = "",
        file: str = metrics_log.EVALUATIONS,
        event: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what was measured after `record["step"]` steps.

        Args:
            name: of the evaluator.
            record: a line of the file. It replaces the line of the same step, and in `evaluations.jsonl` name.
            tracked: values for the trackers, by the names of their curves.
            message: printed; may be empty.
            file: in the run folder; the default is shared by the evaluators that have no file of their own.
            event: what the event holds; None: the record.
        """
        shared = {"name": name} if file == metrics_log.EVALUATIONS else {}
        record = {"step": record["step"], **shared, **record}
        lines = self.lines(file)
        if lines and lines[-1]["step"] >= record["step"]:
            others = [line for line in lines if _measurement(line) != _measurement(record)]
            write_json_lines(self.folder / file, [*others, record])
        else:
            metrics_log.append_line(self.folder / file, record)
        self._events.emit("evaluation" if shared else name, **(record if event is None else event))
        self._accelerator.log(dict(tracked), step=record["step"])
        if message:
            _log.info(message, extra=labelled("", **(record if event is None else event)))

    def add_picture(self, step: int, path: Path) -> None:
        """Record a picture that was written into the run folder: an event, and the picture in the trackers."""
        self._events.emit("picture", step=step, path=path.relative_to(self.folder).as_posix())
        trackers.log_images(self._accelerator, step, path)

    @contextmanager
    def timed(self, name: str, step: int) -> Iterator[None]:
        """Note in timings.jsonl how long the block takes."""
        clock = time.perf_counter()
        yield
        metrics_log.append_seconds(self.folder, step, name, time.perf_counter() - clock)

    def set_phase(self, name: str, step: int) -> None:
        """Emit the event that this is done now."""
        self._events.set_phase(name, step)


def _measurement(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a line was measured of: its step, in a shared file the evaluator's name, and a digest where it has one."""
    return line["step"], line.get("name"), line.get("of")


class EvaluationPeriod:
    """The steps after which an evaluator runs: multiples of a number that is given or measured, and the last.

    It is measured from timings.jsonl, so that a resumed run pauses at the steps at which it would have paused before.

    Args:
        folder: of the run.
        name: under which `EvaluationLog.timed` notes how long the evaluator takes.
        total: steps of the run.
        every: steps between; 0 for none; None: as many as keep its share of the time.
        share: of the run's time that it may take.
        most: how often it runs at most.
    """

    def __init__(self, folder: Path, name: str, total: int, *, every: int | Fraction | None, share: float, most: int):
        self._folder, self._name, self._total = folder, name, total
        self._share, self._most = share, most
        self._every, self._known = every, every is not None

    def includes(self, step: int) -> bool:
        """Whether the evaluator runs after this step."""
        return step == self._total or is_multiple(step, self.every(step))

    def every(self, step: int) -> int | Fraction | None:
        """Steps between; None where that is not known yet, or there is no time for any but the first and the last."""
        if not self._known:
            self._every = self._measured()
            self._known = (
                self._every is not None or step > FIRST_STEPS + 1
            )  # of several processes, a step is noted late
        return self._every

    def _measured(self) -> int | None:
        records = metrics_log.timings(self._folder)
        took = [record[f"{self._name}_seconds"] for record in records if f"{self._name}_seconds" in record]
        first = [record["seconds"] for record in records if "seconds" in record and 1 < record["step"] <= FIRST_STEPS]
        if not took or len(first) < FIRST_STEPS - 1:
            return None
        return eval_interval(took[0], median(first), self._total, share=self._share, most=self._most)


def eval_interval(pause: float, step: float, total: int, *, share: float, most: int) -> int | None:
    """Steps between pauses, so that all of them take no more than a share of the time; None: no room for any.

    Args:
        pause: seconds that the first has taken.
        step: seconds that a step of training takes.
        total: steps of the run.
        share: of the run's time.
        most: pauses, however short they are.
    """
    after_first = min(most, int(share * total * step / pause)) - 1
    return ceil(total / after_first) if after_first > 1 else None


def is_multiple(step: int, every: int | Fraction | None) -> bool:
    """True at the first step at or after each multiple of `every`; None and 0 have none."""
    return bool(every) and step // every > (step - 1) // every


def training_passes(config: ResolvedConfig, share: float = 1) -> float:
    """The cost of a share of a run's training steps, in UNet passes over one picture.

    A training example takes three (forward, and a backward of about two), or two where frozen weights need no gradient
    (LoRA).
    """
    return share * (2 if config.method == "lora" else 3) * config.global_batch * config.max_train_steps

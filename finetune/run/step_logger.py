"""StepLogger: what is recorded of each step, in files, trackers, the progress bar and faults.jsonl."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from finetune.data.caption_augmentation import RunProgress
from finetune.results import metrics_log, trackers
from finetune.results.progress import Progress, progress
from finetune.run.context import Run
from finetune.text import pluralize
from finetune.training.metrics import Fault, NotFinite, StepMetrics
from finetune.training.trainer import Trainer

_log = logging.getLogger(__name__)


class StepWriter(Protocol):
    """Takes the figures of one step after the other."""

    def write(self, metrics: StepMetrics, seconds: float) -> None:
        """Record a step that took so many seconds; its figures are there."""
        ...

    def out_of_memory(self, step: int, micro_batch_size: int) -> None:
        """From this step on, so many examples are computed at a time."""
        ...

    def resume(self) -> None:
        """Training goes on after a pause."""
        ...


class StepLogger:
    """Records each step as soon as nobody has to wait for its figures: on a GPU that is one step later.

    All processes wait for a step's figures at the same point, one step later, so that none leaves the others.

    Args:
        trainer: makes the steps.
        writer: of the main process; None in the others.
    """

    def __init__(self, trainer: Trainer, writer: StepWriter | None):
        self._trainer, self._writer = trainer, writer
        self._waiting: deque[StepMetrics] = deque()
        self._oom_micro_batch_size = trainer.oom_micro_batch_size
        self._clock = time.perf_counter()

    def log(self, metrics: StepMetrics) -> None:
        """Take a step that was just made; record it, or the one before."""
        self._waiting.append(metrics)
        if (size := self._trainer.oom_micro_batch_size) != self._oom_micro_batch_size:
            self._oom_micro_batch_size = size
            if self._writer:
                self._writer.out_of_memory(metrics.step, size or 0)
        alone = self._trainer.parallel.world_size == 1
        while self._waiting and (len(self._waiting) > 1 or (alone and self._waiting[0].ready)):
            self._write(self._waiting.popleft())

    def flush(self) -> None:
        """Record all steps that were made, before something else is done than training."""
        while self._waiting:
            self._write(self._waiting.popleft())

    def resume(self) -> None:
        """What was done since the last step (a grid, a checkpoint) does not count into the time of the next."""
        self._clock = time.perf_counter()
        if self._writer:
            self._writer.resume()

    def _write(self, metrics: StepMetrics) -> None:
        metrics.as_dict()  # waits for the step, so that the time is its own
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self._writer:
            self._writer.write(metrics, seconds)


class RunWriter:
    """Writes the steps of a run: metrics.jsonl and timings.jsonl, the trackers, the progress and the events."""

    def __init__(self, run: Run, log: metrics_log.MetricsLog, progress: Progress):
        self._run, self._log, self._progress = run, log, progress

    def write(self, metrics: StepMetrics, seconds: float) -> None:
        """Record a step, and print what was wrong with it."""
        values = self._log.write(metrics, seconds)
        trackers.log_metrics(self._run.accelerator, metrics)
        self._progress.show(metrics, seconds)
        self._run.events.emit("step", **values, left=round(self._progress.left))
        if metrics.fault:
            record_fault(self._run, metrics.fault)
            _log.warning("%s: its update was left out", metrics.fault)

    def out_of_memory(self, step: int, micro_batch_size: int) -> None:
        """Print that fewer examples are computed at a time."""
        message = f"from step {step} on {pluralize(micro_batch_size, 'image')} at a time, to the same gradient"
        _log.warning("out of memory: %s (the step stays as large)", message)

    def resume(self) -> None:
        """Training goes on after a pause."""
        self._progress.resume()
        self._run.events.set_phase("training", self._run.trainer.steps_done)


@contextmanager
def step_logger(run: Run) -> Iterator[StepLogger]:
    """The logger of a run from the trainer's step on, its files open inside."""
    if not run.trainer.parallel.is_main_process:
        yield StepLogger(run.trainer, None)
        return
    done, total = run.trainer.steps_done, run.config.max_train_steps
    with metrics_log.metrics_log(run.folder, done) as log, progress(done, total) as bar:
        try:
            yield StepLogger(run.trainer, RunWriter(run, log, bar))
        except NotFinite as error:
            record_fault(run, error.fault)
            raise


def record_fault(run: Run, fault: Fault) -> None:
    """Write a line: the step's loss and norm, and id, timestep, caption and loss of each of its examples."""
    (steps_of_chunk,) = run.chunks.chunk_steps(range(fault.step - 1, fault.step), run.config.global_batch)
    pictures = run.chunks.at(steps_of_chunk.chunk)
    epoch = steps_of_chunk.own.start * run.config.global_batch // pictures.epoch_visits
    progress = RunProgress(fault.step - 1, epoch)
    timesteps = run.trainer.objective.sample_timesteps(torch.tensor(fault.keys)).tolist()
    facts = []
    for name, key, t in zip(fault.ids, fault.keys, timesteps, strict=True):
        caption = run.encoded.caption(pictures.ids.index(name), key, progress)
        facts.append({"id": name, "timestep": t, "caption": caption})
    metrics_log.append_fault(run.folder, fault, facts)

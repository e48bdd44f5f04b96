"""What is recorded and printed of each step: lines in files, trackers, progress on the terminal, faults."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch

from finetune.results import tracking
from finetune.run.build import sampler
from finetune.run.context import Run
from finetune.run.evaluation import FIRST_STEPS, should_run
from finetune.run.forgetting import steps_between_readings
from finetune.run.sample_grids import steps_between
from finetune.run.validation import steps_between_validations
from finetune.seeding import example_key
from finetune.text import pluralize
from finetune.training.metrics import Fault, NotFinite, StepMetrics
from finetune.training.objective import timesteps


class StepLogger:
    """Tells of a step as soon as nobody has to wait for its figures: on a GPU that is one step later.

    Of several processes, all hear of a step at the same point, one step later, or the first might leave the others.
    """

    def __init__(self, run: Run, log: tracking.Log, progress: tracking.Progress):
        self._run, self._log, self._progress = run, log, progress
        self._pauses = self._paced()
        self._waiting: deque[StepMetrics] = deque()
        self._oom_micro_batch_size = run.trainer.oom_micro_batch_size
        self._clock = time.perf_counter()

    def _paced(self) -> dict[str, int | Fraction | None]:
        """For what training pauses -> steps between, None while that is not known."""
        run = self._run
        return {
            "validation": steps_between_validations(run),
            "forgetting": steps_between_readings(run),
            "grid": steps_between(run),
        }

    def should_run(self, step: int) -> frozenset[str]:
        """For what training pauses after this step: "validation", "forgetting", "grid"; for all of them in the end."""
        last = step == self._run.config.max_train_steps
        return frozenset(what for what, every in self._pauses.items() if last or should_run(step, every))

    def add(self, metrics: StepMetrics) -> None:
        """A step that was just made; tells of it, or of the one before."""
        self._waiting.append(metrics)
        if (size := self._run.trainer.oom_micro_batch_size) != self._oom_micro_batch_size:
            self._oom_micro_batch_size = size
            pictures = pluralize(size or 0, "picture")
            message = f"from step {metrics.step} on {pictures} at a time, to the same gradient"
            print(f"out of memory: {message} (the step stays as large)", flush=True)
        alone = self._run.trainer.parallel.world_size == 1
        while self._waiting and (len(self._waiting) > 1 or (alone and self._waiting[0].ready)):
            self._write(self._waiting.popleft())

    def finish(self) -> None:
        """Tell of what has not been told of, before something else is done than training."""
        while self._waiting:
            self._write(self._waiting.popleft())

    def resume(self) -> None:
        """What was done since the last step (a grid, a checkpoint) does not count into the time of the next."""
        self._clock = time.perf_counter()
        self._progress.resume()
        self._run.events.set_phase("training", self._run.trainer.steps_done)

    def _write(self, metrics: StepMetrics) -> None:
        metrics.as_dict()  # waits for the step, so that the time is its own
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        values = self._log.write(metrics, seconds)
        tracking.track(self._run.accelerator, metrics)
        self._progress.show(metrics, seconds)
        self._run.events.emit("step", **values, left=round(self._progress.left))
        if metrics.fault:
            record_fault(self._run, metrics.fault)
            print(f"{metrics.fault}: its update was left out", flush=True)
        if metrics.step == FIRST_STEPS:
            self._pauses = self._paced()


@contextmanager
def reports(run: Run) -> Iterator[StepLogger]:
    """The reports of a run from the trainer's step on, its files open inside."""
    done, total = run.trainer.steps_done, run.config.max_train_steps
    with tracking.log(run.folder, done) as log, tracking.progress(done, total) as progress:
        try:
            yield StepLogger(run, log, progress)
        except NotFinite as error:
            record_fault(run, error.fault)
            raise


def record_fault(run: Run, fault: Fault) -> None:
    """Write a line: the step's loss and norm, and id, timestep, caption and loss of each of its examples.

    All of it is a function of seed and step, so it is known here of what another process has computed, too.
    """
    (steps_of_chunk,) = run.chunks.chunk_steps(range(fault.step - 1, fault.step), run.config.global_batch)
    pictures = run.chunks.at(steps_of_chunk.chunk)
    visits, _ = sampler(run.config, pictures).share(steps_of_chunk.own.start)
    keys = [example_key(run.config.seed, pictures.ids[visit.example], visit.number) for visit in visits]
    times = timesteps(torch.tensor(keys), run.model.scheduler.config["num_train_timesteps"]).tolist()
    facts = []
    for visit, key, t in zip(visits, keys, times, strict=True):
        caption = run.encoded.captioning.caption(pictures.texts(visit.example), key)
        facts.append({"id": pictures.ids[visit.example], "timestep": t, "caption": caption})
    tracking.note_fault(run.folder, fault, facts)

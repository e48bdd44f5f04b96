"""Progress of training: a bar on a terminal, lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import nan

from tqdm.auto import tqdm

from finetune.log_handlers import labelled
from finetune.results.metrics_log import peak_memory_gb
from finetune.training.metrics import StepMetrics

_log = logging.getLogger(__name__)


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

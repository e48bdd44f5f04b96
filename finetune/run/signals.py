"""What is asked of a run from outside, by signals and by the clock: to keep a checkpoint, or to stop with one.

Ctrl-C and SIGTERM: finish the step, keep a checkpoint, stop. A second signal leaves at once. SIGUSR1: keep a
checkpoint and go on.

Under torchrun and `accelerate launch` a Ctrl-C comes twice: from the terminal, and from the launcher.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from finetune.errors import Interrupted


class LoopAction(IntEnum):
    """What the loop does after a step; of several, the greatest includes those before it."""

    CONTINUE = 0
    EVALUATE = 1
    CHECKPOINT = 2
    STOP = 3


TIME_UP = 124
"""The exit code after `max_train_minutes`: that of timeout(1)."""


_SAME = 5.0
"""Seconds in which a launcher passes on a signal that the process has got already."""


class StopConditions:
    """What signals and the clock ask of a run.

    Args:
        now: the clock, in seconds.
    """

    save_minutes: float | None = None
    """From one checkpoint to the next; None: none is asked for by the clock."""
    stop_minutes: float | None = None
    """From the making of this object to a stop; None: none is asked for by the clock."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._began = self._saved = now()
        self._save_by_signal = False
        self.stop_request = StopRequest()
        """Of the signals that are caught, see `catch_signals`."""
        self.exit_code = 0
        """With which the process ends after a stop; 0 while none was asked for."""

    def poll(self) -> LoopAction:
        """Return CONTINUE, CHECKPOINT or STOP."""
        now = self._now()
        if self.stop_request.number:
            self.exit_code = 128 + self.stop_request.number
        elif self.stop_minutes and now - self._began >= 60 * self.stop_minutes:
            self.exit_code = TIME_UP
        if self.exit_code:
            return LoopAction.STOP
        by_clock = self.save_minutes and now - self._saved >= 60 * self.save_minutes
        return LoopAction.CHECKPOINT if by_clock or self._save_by_signal else LoopAction.CONTINUE

    def checkpoint_saved(self) -> None:
        """Count the minutes to the next checkpoint from now on."""
        self._saved, self._save_by_signal = self._now(), False

    def interrupted(self, checkpoint: Path, step: int, total: int, exit_code: int) -> Interrupted:
        """Return the error that ends a run which was stopped after a step; the exit code is that of all processes."""
        why = f" after max_train_minutes = {self.stop_minutes}" if exit_code == TIME_UP else ""
        stopped = f"stopped at step {step} of {total}{why}"
        return Interrupted(f"{stopped}; {checkpoint} is saved; run the same command to resume", exit_code)

    @contextmanager
    def catch_sigusr1(self) -> Iterator[None]:
        """Turn SIGUSR1 into a request for a checkpoint; otherwise it would end the process. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, frame: object) -> None:
            self._save_by_signal = True

        before = signal.signal(signal.SIGUSR1, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)


@dataclass
class StopRequest:
    """Whether a signal has asked for a stop."""

    number: int | None = None
    """The signal's number, None while there was none."""


@contextmanager
def catch_signals(now: Callable[[], float] = time.monotonic) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a stop request; the next one acts as it did before.

    Where a launcher has started the process, signals in the `_SAME` seconds after the first are the same one. Outside
    the main thread signals cannot be caught, and the request stays empty.
    """
    request, first = StopRequest(), 0.0
    launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_USE_MULTI_CPU"))
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        nonlocal first
        if request.number is None:
            request.number, first = number, now()
            if not launched:
                restore()
        elif now() - first >= _SAME:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()

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

PAUSE, SAVE, TIME_UP = 1, 2, 124
"""What is asked of a run, the greater before the less: to draw, to save, and to stop with an exit code, of which that
after `max_train_minutes` is timeout(1)'s."""


_SAME = 5.0
"""Seconds in which a launcher passes on a signal that the process has got already."""


class StopConditions:
    """What signals and the clock ask of a run.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._began = self._saved = now()
        self._save_by_signal = False

    def poll(self, stop_signal: int | None, save_minutes: float | None, end_minutes: float | None) -> int:
        """0 for nothing, `SAVE`, or the exit code to stop with; of several the greatest counts.

        Args:
            stop_signal: the number of the signal that has asked for a stop.
            save_minutes: after the last checkpoint, the next is asked for; None: never.
            end_minutes: after this object was made, a stop is asked for; None: never.
        """
        if stop_signal:
            return 128 + stop_signal
        now = self._now()
        if end_minutes and now - self._began >= 60 * end_minutes:
            return TIME_UP
        by_clock = save_minutes and now - self._saved >= 60 * save_minutes
        return SAVE if by_clock or self._save_by_signal else 0

    def saved(self) -> None:
        """A checkpoint was kept."""
        self._saved, self._save_by_signal = self._now(), False

    @contextmanager
    def hearing_usr1(self) -> Iterator[None]:
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

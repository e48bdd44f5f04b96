"""Ctrl-C and SIGTERM: finish the step, keep a checkpoint, stop. A second signal leaves at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """Whether a signal has asked for a stop."""

    number: int | None = None
    """The signal's number, None while there was none."""


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM only sets the request; the handlers are put back after it and at the end.

    Outside the main thread signals cannot be caught, and the request stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        request.number = number
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()

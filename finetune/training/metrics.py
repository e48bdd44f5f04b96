"""StepMetrics: the figures of an optimizer step, read from the device when they are needed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.errors import RunError


@dataclass(frozen=True)
class Fault:
    """A step whose loss or gradient was not finite, so that its update was not made."""

    step: int
    """From 1."""
    ids: tuple[str, ...]
    """Of all its examples."""
    losses: tuple[float, ...]
    """Of each of them."""
    loss: float
    grad_norm: float
    keys: tuple[int, ...] = ()
    """Sample keys of its examples, of which timesteps, noise and captions are functions; none where not known."""

    def __str__(self) -> str:
        bad = [name for name, loss in zip(self.ids, self.losses, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"step {self.step}: the loss is not finite for {', '.join(bad)}"
        return f"step {self.step}: the gradient's norm is {self.grad_norm} over {', '.join(self.ids)}"


class NotFinite(RunError):
    """As many steps in a row as may be had a `Fault`; this is the last."""

    def __init__(self, message: str, fault: Fault):
        super().__init__(message)
        self.fault = fault


class StepValues(NamedTuple):
    """What is known of a step when it is over."""

    loss: float
    grad_norm: float | None
    fault: Fault | None = None


class DeviceScalars:
    """Numbers on their way from the device.

    Args:
        numbers: 0-dimensional tensors on one device.
    """

    def __init__(self, *numbers: Tensor):
        stacked = torch.stack(numbers)
        self._numbers = stacked.to("cpu", non_blocking=True)  # into pinned memory
        self._there = None
        if stacked.device.type == "cuda" and torch.cuda.is_initialized():
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(stacked.device))

    @property
    def ready(self) -> bool:
        """Whether they are there."""
        return self._there is None or self._there.query()

    def wait(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()


class StepMetrics:
    """What one optimizer step did.

    On a GPU the step may still be running when `Trainer.step` returns. Its plain attributes are known then; `loss` and
    `grad_norm` wait for it, so a loop that asks for them after the next step has begun never holds the device up.

    Args:
        step: steps done, this one included.
        lr: learning rate of the step.
        examples: how many it was of.
        arriving: what `loss` and `grad_norm` are read from; None: `read` knows them already.
        read: answers them, or raises.
    """

    def __init__(
        self, step: int, lr: float, examples: int, arriving: DeviceScalars | None, read: Callable[[], StepValues]
    ):
        self.step, self.lr, self.examples = step, lr, examples
        self._arriving = arriving
        self._read: Callable[[], StepValues] | None = read
        self._values = StepValues(0.0, None)
        self._error: NotFinite | None = None

    @property
    def ready(self) -> bool:
        """Whether nobody has to wait for `loss` and `grad_norm`."""
        return self._arriving is None or self._arriving.ready

    @property
    def loss(self) -> float:
        """sum(w l) / sum(w) over the step's examples. Raises NotFinite, as the trainer was told to, if it is not."""
        return self._resolved().loss

    @property
    def grad_norm(self) -> float | None:
        """L2 norm of the gradient before clipping; None where fp16 overflowed and the step was skipped."""
        return self._resolved().grad_norm

    @property
    def fault(self) -> Fault | None:
        """What was wrong, where the step's update was not made for it."""
        return self._resolved().fault

    def as_dict(self) -> dict[str, Any]:
        """All of it, by name, fit for JSON: None where a number is not finite."""
        loss, norm, fault = self._resolved()
        loss, norm = (None, None) if fault else (loss, norm)
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": self.lr, "examples": self.examples}

    def _resolved(self) -> StepValues:
        if self._read is not None:
            read, self._read = self._read, None
            try:
                self._values = read()
            except NotFinite as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return self._values

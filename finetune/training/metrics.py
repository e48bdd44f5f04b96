"""What an optimizer step did, read from the device when it is asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Values = tuple[float, float | None]
"""Loss, and norm of the gradient."""


class Arriving:
    """Numbers on their way from the device.

    Args:
        numbers: 0-dimensional tensors on one device.
    """

    def __init__(self, *numbers: Tensor):
        together = torch.stack(numbers)
        self._numbers = together.to("cpu", non_blocking=True)  # into pinned memory
        self._there = None
        if together.device.type == "cuda" and torch.cuda.is_initialized():
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(together.device))

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

    def __init__(self, step: int, lr: float, examples: int, arriving: Arriving | None, read: Callable[[], Values]):
        self.step, self.lr, self.examples = step, lr, examples
        self._arriving = arriving
        self._read: Callable[[], Values] | None = read
        self._values: Values = (0.0, None)

    @property
    def ready(self) -> bool:
        """Whether nobody has to wait for `loss` and `grad_norm`."""
        return self._arriving is None or self._arriving.ready

    @property
    def loss(self) -> float:
        """sum(w l) / sum(w) over the step's examples. Raises RunError when it or the gradient is not finite."""
        return self._known()[0]

    @property
    def grad_norm(self) -> float | None:
        """L2 norm of the gradient before clipping; None where fp16 overflowed and the step was skipped."""
        return self._known()[1]

    def as_dict(self) -> dict[str, Any]:
        """All of it, by name."""
        loss, norm = self._known()
        return {"step": self.step, "loss": loss, "grad_norm": norm, "lr": self.lr, "examples": self.examples}

    def _known(self) -> Values:
        if self._read is not None:
            self._values, self._read = self._read(), None
        return self._values

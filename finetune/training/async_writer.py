"""AsyncWriter: a thread writes checkpoints while the next steps run."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.batch import map_tensors, tensors_of
from finetune.memory_limit import memory_available

SPARE = 4
"""A copy is only made where this many times its size is free."""

PIECE = 64 * 2**20
"""Bytes that are on their way from a GPU at once."""


class AsyncWriter:
    """One thing at a time is written; who begins with the next waits for it. What went wrong is raised there, or by
    `check` and `wait`.

    Used with `with`: what is under way is finished at its end, unless an interrupt wants to leave at once.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Call `write` in a thread."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="saving", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001  # raised again by `check`, in the thread that asks
            self._error = error

    @property
    def under_way(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what has gone wrong, without waiting."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until nothing is being written. Raises what has gone wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and not issubclass(kind, KeyboardInterrupt):
            self._thread.join()  # the error that is on its way is the one to be told


def copied(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """A `state_dict` with copies of its tensors in the host's memory; None where these would take too much of it."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
    if memory_available() < SPARE * size:
        return None
    bounce = _Bounce()
    copy = map_tensors(bounce.copy, dict(state))
    bounce.finish()
    return copy


class _Bounce:
    """Copies to ordinary memory: from a GPU by way of two pieces of pinned memory, of which the GPU fills one while the
    host empties the other. Straight to ordinary memory the driver does both with one thread, one after the other."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._filled: tuple[torch.cuda.Event, Tensor, Tensor] | None = None

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor of these values in their plain order. Those of a GPU are there after `finish`."""
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        for source, target in zip(_bytes(tensor).split(PIECE), _bytes(copy).split(PIECE), strict=True):
            self._pieces = self._pieces or [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            piece = self._pieces[0][: len(source)]
            piece.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.finish()
            self._filled = event, piece, target
            self._pieces.reverse()
        return copy

    def finish(self) -> None:
        """Empty the piece that was filled last."""
        if self._filled is not None:
            event, piece, target = self._filled
            event.synchronize()
            target.copy_(piece)
            self._filled = None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

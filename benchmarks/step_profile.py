"""Where one step's time goes on a CPU, and what is copied into another dtype in it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


class Casts(TorchDispatchMode):
    """Counts the copies that change a tensor's dtype, and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = {"_to_copy": 0, "copy_": 1}.get(name)
        if source is not None and answer.dtype != args[source].dtype:
            self._add(answer)
        elif name == "_foreach_copy_":
            for to, source in zip(args[0], args[1], strict=True):
                if to.dtype != source.dtype:
                    self._add(to)
        return answer

    def _add(self, written: Tensor) -> None:
        self.count += 1
        self.bytes += written.numel() * written.element_size()


def profile_step(step: Step, unet: torch.nn.Module, optimizer: torch.optim.Optimizer, times: int = 3) -> dict[str, Any]:
    """Seconds of a step, and of its forward, backward and optimizer; casts, and the bytes they write.

    Args:
        step: our step, warm, on a CPU.
        unet, optimizer: of its trainer.
        times: steps that are timed, without counting; one more is counted.
    """
    seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - start

    def wrapped(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with timed(name):
                return plain(*args, **kwargs)

        return call

    start = time.perf_counter()
    with (
        mock.patch.object(unet, "forward", wrapped("forward", unet.forward)),
        mock.patch.object(Tensor, "backward", wrapped("backward", Tensor.backward)),
        mock.patch.object(optimizer, "step", wrapped("optimizer", optimizer.step)),
    ):
        for _ in range(times):
            step()
    whole = (time.perf_counter() - start) / times
    each = {name: total / times for name, total in seconds.items()}
    casts = Casts()
    with casts:
        step()
    outside = 1 - sum(each.values()) / whole
    return {"seconds": whole, **each, "share_outside": outside, "casts": casts.count, "cast_bytes": casts.bytes}

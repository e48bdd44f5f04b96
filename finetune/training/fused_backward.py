"""FusedBackward: weights are updated during the backward pass, so that the whole gradient never exists at once.

Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), section 3.1: a
weight is updated as soon as its gradient is known, which is dropped then. So nothing can be done that needs all of the
gradient before: clip it to its norm, sum it over several passes or processes, or leave a step out for the sake of a
part that comes late.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from finetune.training.stochastic_rounding import StochasticRounding


class FusedBackward:
    """Updates each piece of the weights as soon as a backward pass has made the gradients of all that is in it.

    Args:
        masters: the weights and their pieces.
        step: of the optimizer, which updates what has a gradient.
    """

    def __init__(self, masters: StochasticRounding, step: Callable[[], object]):
        self._masters, self._step = masters, step
        self.norm = torch.zeros(())
        """Of the last backward pass's gradient; not finite where an update was left out."""
        self.changed = False
        """Whether any weight was updated by it."""
        self._key = 0
        self._good = True
        self._missing: list[int] = []
        self._norms: list[Tensor] = []

    @contextmanager
    def updates(self, loss: Tensor, key: int) -> Iterator[None]:
        """Let one `loss.backward()` inside the block update all weights.

        A piece whose gradient is not finite, and all that come after it, stay as they are; so does all of the network
        if the loss is not finite. Waits for the device, for the loss and for each piece.

        Args:
            loss: the number whose gradient it is.
            key: of what is drawn for the rounding.
        """
        self._key, self._good, self.changed = key, bool(loss.isfinite()), False
        self._missing = [len(piece) for piece in self._masters.pieces]
        self._norms = [] if self._good else [torch.full_like(loss.detach(), math.nan)]
        hooks = [
            self._masters.parameters[name].register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, piece in enumerate(self._masters.pieces)
            for name in piece
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for number in (number for number, missing in enumerate(self._missing) if missing):
            self._update(number)  # something in it has no part in the loss
        self.norm = torch.stack(self._norms).norm()

    def _arrived(self, number: int, _parameter: Tensor) -> None:
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._update(number)

    def _update(self, number: int) -> None:
        parameters = [self._masters.parameters[name] for name in self._masters.pieces[number]]
        if self._good:
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True).float()
            self._norms.append(norm)
            self._good = bool(norm.isfinite())
        if self._good:
            self._masters.update_piece(number, self._step, self._key)
            self.changed = True
        for parameter in parameters:
            parameter.grad = None

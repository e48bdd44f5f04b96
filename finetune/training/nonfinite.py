"""FiniteGate: decides on the device whether an update may be made, without waiting for it."""

import torch
from torch import Tensor


class FiniteGate:
    """Shut for a step that is not finite; and from `most` of these in a row on, until it is opened.

    Args:
        most: bad steps in a row after which no update is made.
        device: where the steps are computed.
    """

    def __init__(self, most: int, device: torch.device):
        self._most = most
        self._in_a_row = torch.zeros((), device=device)
        self._halted = torch.zeros((), device=device)

    def shut(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 where this step's update is not to be made, else 0.0: what fused optimizers take as `found_inf`."""
        bad = ~(loss.isfinite() & norm.isfinite())
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0.0)
        self._halted = torch.maximum(self._halted, (self._in_a_row >= self._most).float())
        return torch.maximum(self._halted, bad.float())

    def open(self, in_a_row: int = 0) -> None:
        """As after so many bad steps."""
        self._in_a_row.fill_(in_a_row)
        self._halted.zero_()

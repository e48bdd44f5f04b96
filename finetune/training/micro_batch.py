"""MicroBatch and PreparedStep: the inputs of an optimizer step, on the device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from finetune.batch import map_tensors


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass, drawn and on the device."""

    drawn: Any
    cond: Mapping[str, Any]
    unet_channels: Tensor | None
    share: Tensor
    """(B,) fp32: of each example's loss in that of the step, w / sum(w) over all parts."""
    prior: Tensor | None = None
    """(P,) int64: which of them are class pictures; None: none, or it does not matter."""

    def __len__(self) -> int:
        return len(self.share)

    def split(self, size: int) -> list["MicroBatch"]:
        """Consecutive slices of at most `size` examples."""
        plain, pieces = replace(self, prior=None), []
        for at in range(0, len(self), size):
            piece = map_tensors(lambda tensor, at=at: tensor[at : at + size], plain)
            rows = None if self.prior is None else self.prior[(self.prior >= at) & (self.prior < at + size)] - at
            pieces.append(replace(piece, prior=rows if rows is not None and len(rows) else None))
        return pieces


@dataclass(frozen=True)
class PreparedStep:
    """All that an optimizer step takes, on the device: `Trainer.prepare` makes it, ahead of time if you like."""

    parts: tuple[MicroBatch, ...]
    ids: tuple[str, ...]
    """Of the whole step, in all processes."""
    start: int = 0
    """Where those of this process begin."""
    keys: tuple[int, ...] = ()
    """Sample keys of the whole step, in the order of `ids`; none where they are not known."""

    def cut(self, size: int | None) -> "PreparedStep":
        """Return the step in micro-batches of at most `size` examples; None: unchanged."""
        if size is None or all(len(part) <= size for part in self.parts):
            return self
        return replace(self, parts=tuple(piece for part in self.parts for piece in part.split(size)))

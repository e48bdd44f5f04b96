"""CaptionAugmentation: dropout, shuffling and choice of captions per visit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune import seeding


@dataclass(frozen=True)
class CaptionAugmentation:
    """How the caption of a visit comes from those of its picture; all of it drawn from the visit's key."""

    dropout: float = 0.0
    """Share of visits without words, in [0, 1)."""
    shuffle: bool = False
    """The parts between commas come in another order at each visit."""
    keep_tokens: int | None = None
    """So many of these parts, from the first, stay where they are; None: none."""
    trigger: str | None = None
    """A word in front of captions, which stays there."""

    def caption(self, captions: Sequence[str], key: int) -> str:
        """One of the captions, each as likely, or the empty one."""
        keys = torch.tensor([key])
        if self.dropout and seeding.uniform(keys, "caption dropout").item() < self.dropout:
            return ""
        number = int(seeding.integers(keys, "caption", len(captions))) if len(captions) > 1 else 0
        return self._shuffled(captions[number], key) if self.shuffle else captions[number]

    def _shuffled(self, caption: str, key: int) -> str:
        if self.trigger and caption.startswith(f"{self.trigger} "):
            return f"{self.trigger} {self._shuffled(caption.removeprefix(f'{self.trigger} '), key)}"
        tags = [part.strip() for part in caption.split(",")]
        count = self.keep_tokens or 0
        first, moved = tags[:count], tags[count:]
        order = torch.randperm(len(moved), generator=seeding.generator(key, "caption order")).tolist()
        return ", ".join([*first, *[moved[place] for place in order]])

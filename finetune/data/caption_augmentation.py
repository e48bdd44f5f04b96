"""CaptionAugmentation: dropout, shuffling, wildcards and choice of captions per visit.

The rules are those of sd-scripts (`library/train_util.py`, `process_caption`), with every random choice drawn from the
key of the visit.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

import torch

from finetune import seeding


class RunProgress(NamedTuple):
    """How far a run is at a visit; some rules for captions change on the way."""

    step: int
    """Optimizer steps before."""
    epoch: int
    """Epochs before."""


_WILDCARD = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True)
class CaptionAugmentation:
    """How the caption of a visit comes from those of its picture; all of it drawn from the visit's key."""

    dropout: float = 0.0
    """Share of visits without words, in [0, 1)."""
    dropout_every_n_epochs: int | None = None
    """Every n-th epoch is without words; None: none is."""
    shuffle: bool = False
    """Tags, the parts between separators, come in another order at each visit."""
    keep_tokens: int | None = None
    """Number of tags at the start that stay where they are and are never dropped; None: none."""
    trigger: str | None = None
    """A word in front of captions, which stays there."""
    tag_dropout: float = 0.0
    """Share of the tags that a visit leaves out, in [0, 1)."""
    tag_dropout_mode: Literal["each", "rising", "all"] = "each"
    """Which: each for itself; the later in the caption the more often; or all of them in this share of the visits, the
    modes RANDOM, RANDOM WEIGHTED and FULL of OneTrainer (`DropTags` of its library mgds)."""
    warmup_steps: int = 0
    """Steps in which the number of tags rises from `warmup_min` to all of them."""
    warmup_min: int = 1
    """Tags at the first step, beside those that are kept."""
    wildcards: bool = False
    """{a|b} stands for one of its parts at each visit; {{ and }} for braces."""
    prefix: str = ""
    """Text in front of each caption."""
    suffix: str = ""
    """Text behind each caption."""
    separator: str = ","
    """What separates tags."""
    keep_tokens_separator: str = ""
    """Where a caption has it, what is in front of it stays in place instead of `keep_tokens`, and what is behind a
    second one too."""
    secondary_separator: str = ""
    """Separates tags that stay together; it becomes a separator in the end."""

    @property
    def varies(self) -> bool:
        """Whether a caption has more forms than its own and the empty one."""
        return self._moves_tags or self.wildcards

    @property
    def _moves_tags(self) -> bool:
        return self.shuffle or self.tag_dropout > 0 or self.warmup_steps > 0

    def plain(self, caption: str) -> str:
        """The form of a caption in which nothing is drawn."""
        return self._joined(self._framed(caption))

    def caption(self, captions: Sequence[str], key: int, progress: RunProgress | None = None) -> str:
        """One of the captions, each as likely, in the form of this visit; or the empty one.

        Args:
            captions: of the image.
            key: of the visit.
            progress: of the run at the visit; None: what changes on the way is over.
        """
        every = self.dropout_every_n_epochs
        if every and progress and (progress.epoch + 1) % every == 0:
            return ""
        keys = torch.tensor([key])
        if self.dropout and seeding.uniform(keys, "caption dropout").item() < self.dropout:
            return ""
        number = int(seeding.integers(keys, "caption", len(captions))) if len(captions) > 1 else 0
        caption = captions[number]
        if not self.varies:
            return self.plain(caption)
        if self.trigger and caption.startswith(f"{self.trigger} "):
            return f"{self.trigger} {self._visited(caption.removeprefix(f'{self.trigger} '), key, progress)}"
        return self._visited(caption, key, progress)

    def _visited(self, caption: str, key: int, progress: RunProgress | None) -> str:
        caption = self._framed(caption)
        if self.wildcards:
            caption = expanded(caption, key)
        if self._moves_tags:
            first, moved, last = self._tags(caption)
            if progress and progress.step < self.warmup_steps:
                more = progress.step * (len(moved) - self.warmup_min) / self.warmup_steps
                moved = moved[: floor(more) + self.warmup_min]
            if self.tag_dropout and self.tag_dropout_mode != "each":
                moved = self._after_dropout(moved, key)
            if self.shuffle:
                order = torch.randperm(len(moved), generator=seeding.generator(key, "caption order")).tolist()
                moved = [moved[place] for place in order]
            if self.tag_dropout and self.tag_dropout_mode == "each":
                moved = self._after_dropout(moved, key)
            caption = ", ".join([*first, *moved, *last])
        return self._joined(caption)

    def _after_dropout(self, tags: list[str], key: int) -> list[str]:
        """The tags that a visit does not leave out."""
        generator = seeding.generator(key, "tag dropout")
        if self.tag_dropout_mode == "all":
            return tags if torch.rand((), generator=generator).item() >= self.tag_dropout else []
        rising = self.tag_dropout_mode == "rising"
        shares = [self.tag_dropout * ((place + 1) / len(tags) if rising else 1) for place in range(len(tags))]
        draws = torch.rand(len(tags), generator=generator).tolist()
        return [tag for tag, draw, share in zip(tags, draws, shares, strict=True) if draw >= share]

    def _framed(self, caption: str) -> str:
        caption = f"{self.prefix} {caption}" if self.prefix else caption
        return f"{caption} {self.suffix}" if self.suffix else caption

    def _joined(self, caption: str) -> str:
        return caption.replace(self.secondary_separator, self.separator) if self.secondary_separator else caption

    def _tags(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, those that move, and those that stay behind."""
        if self.keep_tokens_separator and self.keep_tokens_separator in caption:
            sections = caption.split(self.keep_tokens_separator, 2)
            first, moved, last = ([tag for tag in self._split(part) if tag] for part in (*sections, "")[:3])
            return first, moved, last
        tags = self._split(caption.strip())
        count = self.keep_tokens or 0
        return tags[:count], tags[count:], []

    def _split(self, text: str) -> list[str]:
        return [tag.strip() for tag in text.split(self.separator)]


def expanded(caption: str, key: int) -> str:
    """The caption with one part of each {a|b|c}, drawn from the key; one without an end stays as it is."""
    left, right = "⦅", "⦆"
    while left in caption or right in caption:
        left, right = left + "⦅", right + "⦆"
    caption = caption.replace("{{", left).replace("}}", right)
    pieces, end = [], 0
    for number, match in enumerate(_WILDCARD.finditer(caption)):
        choices = match[1].split("|")
        choice = int(seeding.integers(torch.tensor([key]), f"wildcard {number}", len(choices)))
        pieces += [caption[end : match.start()], choices[choice]]
        end = match.end()
    return "".join([*pieces, caption[end:]]).replace(left, "{").replace(right, "}")

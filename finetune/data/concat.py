"""Joined: several datasets as one."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from PIL import Image

from finetune.data.captions import Caption
from finetune.data.data_source import called
from finetune.data.image_checks import ImageInfo, RejectedImage
from finetune.data.image_dataset import Example, ImageDataset, Ledger


class ConcatPart(NamedTuple):
    """One of the datasets."""

    name: str
    """What the ids of its pictures begin with; "": they stay as they are."""
    pictures: ImageDataset
    repeats: int
    """How many times each of its own repeats comes in an epoch; 0: it is held out."""
    weight: float = 1.0
    """How much each picture counts in the loss."""
    remembered: bool = False
    """Whether it holds class pictures; the last ones may."""

    def named(self, name: str) -> str:
        """The id of a picture that has this one in its own dataset."""
        return f"{self.name}/{name}" if self.name else name

    def sources(self) -> "Counter[str]":
        """How many captions came from where; the prompt of class pictures is one of its own."""
        renamed = {"prompt": "class_prompt"} if self.remembered else {}
        return Counter({renamed.get(name, name): count for name, count in self.pictures.sources.items()})


class ConcatDataset(ImageDataset):
    """The pictures of several datasets that share one transform, one dataset after the other.

    An id is the name of the dataset and the id there: "cats/a.png".
    """

    def __init__(self, parts: Sequence[ConcatPart]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(len(part.pictures) for part in parts))
        texts = [part.pictures.texts(index) for part in parts for index in range(len(part.pictures))]
        super().__init__(
            [part.named(name) for part in parts for name in part.pictures.ids],
            [Caption(first, "", tuple(others)) for first, *others in texts],
            [content for part in parts for content in part.pictures.contents],
            trigger=None,
            transform=parts[0].pictures.transform,
            repeats=[part.repeats * times for part in parts for times in part.pictures.repeats],
        )
        self.num_subject_images = sum(
            part.pictures.num_subject_images for part in parts if part.repeats and not part.remembered
        )
        self.weights = [part.weight * weight for part in parts for weight in part.pictures.weights]
        self.masked = any(part.pictures.masked for part in parts)
        self.sources = sum((part.sources() for part in parts), Counter())
        self.passed_over = [line for part in parts for line in part.pictures.passed_over]
        self.quarantined = [
            RejectedImage(part.named(bad.path), bad.reason) for part in parts for bad in part.pictures.quarantined
        ]

    def __getitem__(self, index: int) -> Example:
        part, place = self._place(index)
        return part.pictures[place]._replace(id=self.ids[index])

    def companions(self, index: int) -> Mapping[str, str]:
        part, place = self._place(index)
        return part.pictures.companions(place)

    def companion(self, index: int, kind: str) -> Image.Image | None:
        part, place = self._place(index)
        return part.pictures.companion(place, kind)

    def image_info(self, index: int) -> ImageInfo:
        part, place = self._place(index)
        return part.pictures.image_info(place)

    def ledger(self) -> Ledger:
        ledgers, joint = [part.pictures.ledger() for part in self._parts], super().ledger()
        return joint._replace(
            found=sum(ledger.found for ledger in ledgers),
            captions=sum(ledger.captions for ledger in ledgers),
            masks=sum(ledger.masks for ledger in ledgers),
            skipped=sum((Counter(ledger.skipped) for ledger in ledgers), Counter(joint.skipped)),
        )

    def notes(self) -> list[str]:
        notes = [
            ("" if isinstance(part.pictures, ConcatDataset) else part.name, part.pictures.notes())
            for part in self._parts
        ]
        return [f"{name}: {line}" if name else line for name, lines in notes for line in lines]

    def _place(self, index: int) -> tuple[ConcatPart, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def with_class_pictures(name: str, subject: ImageDataset, kind: ImageDataset, weight: float) -> ConcatDataset:
    """The pictures of a subject, and after them those of its kind, so that the kind is not forgotten.

    In an epoch the kind is seen as often as the subject, its pictures in turn, and counts `weight` times as much. The
    loss of a step is in expectation (subject + weight kind) / (1 + weight), where diffusers' script adds without
    dividing.

    Args:
        name: of the subject's dataset.
        subject: what is to be learned.
        kind: what is to be remembered.
        weight: of the prior loss (Ruiz et al. 2022, "DreamBooth", eq. 2).
    """
    return ConcatDataset([ConcatPart(name, subject, 1), ConcatPart("class", kind, 1, weight, remembered=True)])


def names_of(sources: Sequence[str]) -> list[str]:
    """A name for each source, the last part of its path; a number after it where another source has the same."""
    names: list[str] = []
    for source in sources:
        name, number = called(source) or "data", 2
        unique = name
        while unique in names:
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names

"""ConcatDataset: the pictures of several sources as one dataset."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from PIL import Image

from finetune.data.caption_augmentation import CaptionAugmentation
from finetune.data.captions import Caption
from finetune.data.data_source import called
from finetune.data.image_checks import ImageInfo, RejectedImage
from finetune.data.image_dataset import Example, ImageDataset, Ledger
from finetune.data.image_sample import ImageSample
from finetune.data.sampler import Turns
from finetune.data.source_settings import SourceSettings


class Source(NamedTuple):
    """The opened pictures of a source, and its settings."""

    settings: SourceSettings
    pictures: ImageDataset

    def full_id(self, name: str) -> str:
        """Return the id of a picture that has this one in its own dataset."""
        return f"{self.settings.name}/{name}" if self.settings.name else name

    def caption_sources(self) -> "Counter[str]":
        """How many captions came from where; the prompt of class pictures is one of its own."""
        renamed = {"prompt": "class_prompt"} if self.settings.class_images else {}
        return Counter({renamed.get(name, name): count for name, count in self.pictures.sources.items()})


class ConcatDataset(ImageDataset):
    """The pictures of several sources, one source after the other; each picture is treated as its source says.

    An id is the name of the source and the id there: "cats/a.png".

    Args:
        sources: at least one; those of class images come last.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._ends = list(accumulate(len(source.pictures) for source in sources))
        texts = [source.pictures.texts(index) for source in sources for index in range(len(source.pictures))]
        super().__init__(
            [source.full_id(name) for source in sources for name in source.pictures.ids],
            [Caption(first, "", tuple(others)) for first, *others in texts],
            [content for source in sources for content in source.pictures.contents],
            trigger=None,
            transform=sources[0].pictures.transform,
            repeats=[source.settings.repeats * times for source in sources for times in source.pictures.repeats],
        )
        self.num_subject_images = sum(
            source.pictures.num_subject_images
            for source in sources
            if source.settings.repeats and not source.settings.class_images
        )
        self.sampled = [
            turns for source, end in zip(sources, self._ends, strict=True) for turns in _sampled(source, end)
        ]
        self.weights = [
            source.settings.loss_weight * weight for source in sources for weight in source.pictures.weights
        ]
        self.masked = any(source.pictures.masked for source in sources)
        self.sources = sum((source.caption_sources() for source in sources), Counter())
        self.passed_over = [line for source in sources for line in source.pictures.passed_over]
        self.quarantined = [
            RejectedImage(source.full_id(bad.path), bad.reason)
            for source in sources
            for bad in source.pictures.quarantined
        ]

    def sample(self, index: int) -> ImageSample:
        source, place = self._place(index)
        sample = source.pictures.sample(place)
        sample.id = self.ids[index]
        return sample

    def __getitem__(self, index: int) -> Example:
        source, place = self._place(index)
        return source.pictures[place]._replace(id=self.ids[index])

    def image_info(self, index: int) -> ImageInfo:
        return self.sample(index).info

    def companions(self, index: int) -> Mapping[str, str]:
        return self.sample(index).companions

    def companion(self, index: int, kind: str) -> Image.Image | None:
        return self.sample(index).open_companion(kind)

    def captioning(self, index: int, of_run: CaptionAugmentation) -> CaptionAugmentation:
        source, place = self._place(index)
        changes = source.settings.captioning
        return source.pictures.captioning(place, replace(of_run, **changes) if changes else of_run)

    @property
    def flips(self) -> bool:
        return any(source.pictures.flips for source in self._sources)

    def sizes(self) -> list[tuple[int, int]]:
        return [size for source in self._sources for size in source.pictures.sizes()]

    def ledger(self) -> Ledger:
        ledgers, joint = [source.pictures.ledger() for source in self._sources], super().ledger()
        return joint._replace(
            found=sum(ledger.found for ledger in ledgers),
            captions=sum(ledger.captions for ledger in ledgers),
            masks=sum(ledger.masks for ledger in ledgers),
            skipped=sum((Counter(ledger.skipped) for ledger in ledgers), Counter(joint.skipped)),
        )

    def notes(self) -> list[str]:
        notes = [
            ("" if isinstance(source.pictures, ConcatDataset) else source.settings.name, source.pictures.notes())
            for source in self._sources
        ]
        of_sources = [f"{name}: {line}" if name else line for name, lines in notes for line in lines]
        return [*of_sources, *self._same_images()]

    def _same_images(self) -> list[str]:
        """A line for each source that has the images of one before it; each is trained with its own settings."""
        first: dict[frozenset[str], str] = {}
        lines = []
        for source in self._sources:
            images = frozenset(source.pictures.contents)
            if images and (other := first.setdefault(images, source.settings.name)) != source.settings.name:
                lines.append(
                    f"{source.settings.name} has the same images as {other}; each is trained as its source says"
                )
        return lines

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)


def _sampled(source: Source, end: int) -> list[Turns]:
    """The groups of a source's pictures that take turns, by their numbers among those of all; `end` is its last's."""
    first = end - len(source.pictures)
    if source.settings.samples is not None:
        return [Turns(range(first, end), source.settings.samples)]
    return [Turns([first + index for index in some], visits) for some, visits in source.pictures.sampled]


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

"""What every dataset of pictures is to the rest of the package, and what it tells of itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from PIL import Image

from finetune.data.transforms import Preprocess
from finetune.errors import DataError


class Example(NamedTuple):
    """One picture to learn from."""

    image: Image.Image
    """RGB, 8 bit, upright, in its original size."""
    caption: str
    id: str
    """Unique within the dataset and the same wherever the dataset lies; randomness is drawn from it."""


class Report(NamedTuple):
    """What a dataset found where it looked for pictures."""

    sources: Mapping[str, int]
    """How many captions came from where: txt, caption, metadata, column, prompt, none."""
    notes: Sequence[str] = ()
    """Lines for the user, about what is left out or looks wrong."""


class Pictures(Protocol):
    """A map-style dataset that is ready to be encoded."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def transform(self) -> Preprocess | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def report(self) -> Report: ...


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def about_triggers(triggerless: int) -> list[str]:
    """A note about captions that say [trigger] where no trigger word was given."""
    said = f"{triggerless} captions say [trigger], but no --trigger is given: it is left out of them"
    return [said] if triggerless else []


def refuse_doubled(ids: Sequence[str]) -> None:
    """Raise DataError when an id stands for two pictures."""
    doubled = [name for name, count in Counter(ids).items() if count > 1]
    if doubled:
        raise DataError(f"two pictures have the id {doubled[0]!r}")

"""Store: the outputs of the frozen networks, by a key of the content that they were computed from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

Item = Mapping[str, Tensor]
"""What is stored under one key: tensors on the CPU by name."""

Kind = Literal["picture", "caption"]
"""What an item was made from, as cache folders record it."""

KIND_NAMES: Mapping[str, str] = {"picture": "image", "caption": "caption"}
"""What messages call each kind."""


class Store(Protocol):
    """Content key -> tensors. Items never change, so a key that is there needs no second look."""

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that have no item yet, each once, in their order."""
        ...

    def claim(self, keys: Sequence[str]) -> list[str]:
        """Return the missing keys that this process is to compute; no other process computes them while it lives."""
        ...

    def put(self, kind: Kind, items: Mapping[str, Item]) -> None:
        """Keep items, all or none of them."""
        ...

    def load(self, keys: Sequence[str]) -> list[Item]:
        """The items of keys that are there, each tensor a copy of its own."""
        ...

    def mark_used(self, keys: Sequence[str]) -> None:
        """Note that these items are in use, so that they are kept when room is made."""
        ...

    def close(self) -> None:
        """Nothing more is going to be put; loading goes on."""
        ...


class MemoryStore:
    """Items in the memory of this process."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in dict.fromkeys(keys) if key not in self._items]

    def claim(self, keys: Sequence[str]) -> list[str]:
        return list(keys)

    def put(self, kind: Kind, items: Mapping[str, Item]) -> None:
        self._items.update(items)

    def load(self, keys: Sequence[str]) -> list[Item]:
        return [self._items[key] for key in keys]

    def mark_used(self, keys: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass

"""BufferedStore: a store that buffers new items in memory until they fill a shard of another store."""

import time
from collections.abc import Iterable, Mapping, Sequence

from finetune.cache.store import Item, Kind, Store

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when one of these is reached: what a killed process loses."""


class BufferedStore:
    """A store whose items, put one by one, come to another store together; they can be loaded at once.

    Args:
        store: where they are kept in the end.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, Item] = {}
        self._kinds: dict[str, Kind] = {}
        self._bytes, self._since = 0, time.monotonic()

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in self._store.missing(keys) if key not in self._waiting]

    def claim(self, keys: Sequence[str]) -> list[str]:
        return self._store.claim(self.missing(keys))

    def put(self, kind: Kind, items: Mapping[str, Item]) -> None:
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting |= items
        self._kinds |= dict.fromkeys(items, kind)
        self._bytes += sum(tensor.nbytes for item in items.values() for tensor in item.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Hand over what waits."""
        for kind in dict.fromkeys(self._kinds.values()):
            self._store.put(kind, {key: item for key, item in self._waiting.items() if self._kinds[key] == kind})
        self._waiting, self._kinds, self._bytes = {}, {}, 0

    def load(self, keys: Sequence[str]) -> list[Item]:
        written = [key for key in keys if key not in self._waiting]
        stored = dict(zip(written, self._store.load(written), strict=True)) if written else {}
        return [stored[key] if key in stored else self._waiting[key] for key in keys]

    def mark_used(self, keys: Sequence[str]) -> None:
        self._store.mark_used(keys)

    def close(self) -> None:
        try:
            self.write()
        finally:
            self._store.close()

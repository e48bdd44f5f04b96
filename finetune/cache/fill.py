"""Fill a store: compute what is missing, beside other processes that do the same, and keep it as it comes."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from finetune.cache.store import Item, Kind, Store

CLAIMED_AT_ONCE = 16
"""Few, so that two processes share the work to its end."""

SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0
"""A shard is written when one of these is reached: what a killed process loses."""

_THREADS = min(8, os.cpu_count() or 1)
"""That prepare."""

_AHEAD = 4 * _THREADS
"""Keys that are prepared while one is computed."""

_WAIT = 0.2
"""Seconds between two looks at what another process computes."""

T = TypeVar("T")
Prepared = TypeVar("Prepared")


class Made(NamedTuple):
    """What became of what was wanted."""

    kind: Kind
    items: int
    """That are there now."""
    new: int
    """Of these, computed by this process; the others were there, or came from another one."""


def fill(
    store: Store,
    kind: Kind,
    keys: Sequence[str],
    prepare: Callable[[str], Prepared],
    compute: Callable[[str, Prepared], Item],
) -> Made:
    """See to it that each key has its item. Threads prepare; what they do overlaps with what this one computes.

    Args:
        store: to be filled.
        kind: of the items.
        keys: in the order in which they are wanted, each once.
        prepare: key -> what is needed to compute its item; runs in a thread of its own.
        compute: key and what was prepared -> its item.
    """
    new, missing = 0, store.missing(keys)
    bar = tqdm(total=len(missing), desc=f"encoding {kind}s", unit=kind, delay=3, leave=False)
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        while missing:
            shard = _Shard(store, kind)
            try:
                for key, prepared in _ahead(pool, prepare, _claimed(store, missing)):
                    shard.add(key, compute(key, prepared))
                    bar.update()
            finally:
                shard.write()  # also what came before an error
            new += shard.items
            missing = store.missing(missing)
            bar.n = bar.total - len(missing)
            if missing and not shard.items:
                time.sleep(_WAIT)
    store.mark_used(keys)
    return Made(kind, len(keys), new)


class _Shard:
    """Items on their way into the store."""

    def __init__(self, store: Store, kind: Kind) -> None:
        self.store = store
        self.kind: Kind = kind
        self.items = 0
        self._items: dict[str, Item] = {}
        self._bytes, self._since = 0, time.monotonic()

    def add(self, key: str, item: Item) -> None:
        self.items += 1
        self._items[key] = item
        self._bytes += sum(_size(tensor) for tensor in item.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        self.store.put(self.kind, self._items)
        self._items, self._bytes, self._since = {}, 0, time.monotonic()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _claimed(store: Store, keys: Sequence[str]) -> Iterator[str]:
    """Those of the keys that nobody else computes, claimed a few at a time."""
    for start in range(0, len(keys), CLAIMED_AT_ONCE):
        yield from store.claim(keys[start : start + CLAIMED_AT_ONCE])


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[str], Prepared], keys: Iterable[str]
) -> Iterator[tuple[str, Prepared]]:
    """Each key with what was prepared for it, in order, some of them prepared ahead."""
    waiting: deque[tuple[str, Future[Prepared]]] = deque()
    for key in keys:
        waiting.append((key, pool.submit(prepare, key)))
        if len(waiting) > _AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()

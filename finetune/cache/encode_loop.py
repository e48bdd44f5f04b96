"""The encoding loop: compute the missing items of a store, shared with other processes, and write them as they come."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from finetune.cache.buffered_store import BufferedStore
from finetune.cache.store import KIND_NAMES, Item, Kind
from finetune.models.conditioners import Conditioner
from finetune.models.encoders import Encoder

CLAIMED_AT_ONCE = 16
"""Few, so that two processes share the work to its end."""

THREADS = min(8, os.cpu_count() or 1)
"""That prepare."""

AHEAD = 4 * THREADS
"""Keys that are prepared while one is computed."""

_TELLING = 16
"""After so many items it is known how long one takes."""

_WAIT = 0.2
"""Seconds between two looks at what another process computes."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Items of one kind, and how they are made."""

    kind: Kind
    keys: Sequence[str]
    """Each once, in the order in which they are wanted."""
    keys_of: Callable[[int, int], Sequence[str]]
    """Number of an example, key of a visit -> the keys of all that the visit may need."""
    prepare: Callable[[str], Any]
    """Key -> what is needed to compute its item; runs in a thread of its own."""
    compute: Callable[[Sequence[str], Sequence[Any]], Sequence[Item]]
    """Keys, and what was prepared for them, all of one shape -> their items."""
    batch_size: Callable[[Any], int]
    """What was prepared -> how many like it are best computed together."""
    network: Encoder | Conditioner
    """What computes."""


Group = tuple[list[str], list[Any]]
"""Keys, and what was prepared for them."""


class EncodeStats(NamedTuple):
    """What became of what was wanted."""

    kind: Kind
    items: int
    """That are wanted."""
    new: int
    """Of these, computed by this process; the others were there, or came from another one."""
    left: int = 0
    """Of these, not there yet: too much for the time that was given."""


def encode_missing(
    store: BufferedStore,
    work: EncodeJob,
    time_budget: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EncodeStats:
    """Compute the missing items of a store. Threads prepare items while this one computes.

    Args:
        store: to be filled.
        work: what is wanted.
        at_most: seconds. As soon as it shows that all will take longer, the rest is left. None: however long it takes.
        on_progress: called, as it goes on, what is made, how many are, and of how many.
    """
    new, clock, missing = 0, time.monotonic(), store.missing(work.keys)
    total, doing = len(missing), f"encoding {KIND_NAMES[work.kind]}s"

    def late() -> bool:
        took = time.monotonic() - clock
        return time_budget is not None and (took / new * total if new >= _TELLING else took) >= time_budget

    pool = ThreadPoolExecutor(THREADS)
    bar = tqdm(total=total, desc=doing, unit=KIND_NAMES[work.kind], delay=3, leave=False)
    try:
        while missing and not late():
            before = new
            for keys, prepared in group_by_shape(_ahead(pool, work.prepare, _claimed(store, missing)), work.batch_size):
                store.put(work.kind, dict(zip(keys, work.compute(keys, prepared), strict=True)))
                new += len(keys)
                bar.update(len(keys))
                if on_progress:
                    on_progress(doing, new, total)
                if late():
                    break
            store.write()
            missing = store.missing(missing)
            bar.n = total - len(missing)
            if missing and new == before:
                time.sleep(_WAIT)
    finally:
        store.write()  # also what came before an error
        pool.shutdown(cancel_futures=True)
        bar.close()
    store.mark_used(work.keys)
    return EncodeStats(work.kind, len(work.keys), new, len(missing))


def _claimed(store: BufferedStore, keys: Sequence[str]) -> Iterator[str]:
    """Yield the keys that no other process computes, claimed a few at a time."""
    for start in range(0, len(keys), CLAIMED_AT_ONCE):
        yield from store.claim(keys[start : start + CLAIMED_AT_ONCE])


def _ahead(pool: ThreadPoolExecutor, prepare: Callable[[str], Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Each key with what was prepared for it, in order, some of them prepared ahead."""
    waiting: deque[tuple[str, Future[Any]]] = deque()
    for key in keys:
        waiting.append((key, pool.submit(prepare, key)))
        if len(waiting) > AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def group_by_shape(items: Iterable[tuple[str, Any]], batch_size: Callable[[Any], int]) -> Iterator[Group]:
    """Keys and what was prepared for them, by shape: groups of so many as are best, and at the end what is left."""
    waiting: dict[Any, list[tuple[str, Any]]] = {}
    for key, prepared in items:
        shape = getattr(prepared, "shape", None)
        waiting.setdefault(shape, []).append((key, prepared))
        if len(waiting[shape]) >= batch_size(prepared):
            yield _group(waiting.pop(shape))
    yield from map(_group, waiting.values())


def _group(items: Sequence[tuple[str, Any]]) -> Group:
    return [key for key, _ in items], [prepared for _, prepared in items]

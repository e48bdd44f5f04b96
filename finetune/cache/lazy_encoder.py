"""LazyEncoder: encodes items when a visit needs them, so that training starts before everything is encoded."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from finetune.cache.buffered_store import BufferedStore
from finetune.cache.encode_loop import AHEAD, THREADS, EncodeJob, group_by_shape


class LazyEncoder:
    """What `encode_missing` has left, computed as far as visits need it. Threads prepare what comes next meanwhile.

    No other process is waited for: what two of them come to at the same time is computed by both, to the same bits.

    Args:
        store: to be filled.
        work: what is wanted, in the order of the visits.
    """

    def __init__(self, store: BufferedStore, work: EncodeJob) -> None:
        self.store, self.work = store, work
        missing = store.missing(work.keys)
        store.claim([])  # a folder that cannot be written is told before the first step
        self._left, self._coming = set(missing), iter(missing)
        self._prepared: dict[str, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return not self._left

    def encode_for(self, visits: Iterable[tuple[int, int]]) -> None:
        """Compute what is missing for these visits, number of the example and key of each."""
        missing = dict.fromkeys(key for visit in visits for key in self.work.keys_of(*visit))
        for keys, prepared in group_by_shape(self._missing(missing), self.work.batch_size):
            self.store.put(self.work.kind, dict(zip(keys, self.work.compute(keys, prepared), strict=True)))
        if self.done:
            self.close()
            self.work.network.to("cpu")

    def close(self) -> None:
        """Prepare nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _missing(self, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Yield the keys without an item, with what is prepared for them."""
        for key in keys:
            if key not in self._left:
                continue
            self._prepare_ahead()
            future = self._prepared.pop(key, None) or self._pool.submit(self.work.prepare, key)
            self._left.remove(key)
            if self.store.missing([key]):
                yield key, future.result()

    def _prepare_ahead(self) -> None:
        while len(self._prepared) < AHEAD and (key := next(self._coming, None)) is not None:
            if key in self._left:
                self._prepared[key] = self._pool.submit(self.work.prepare, key)

"""The next items of an iterator, made by a thread while this one is in use."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

_DEPTH = 2
"""Items made ahead: one is enough where all take as long, two smooth what does not."""


@contextmanager
def ahead(items: Iterator[Item], *, wanted: bool = True) -> Iterator[Iterator[Item]]:
    """Inside, an iterator over the same items, the next two of which are made by one thread before they are asked for.

    What making one raises is raised where it is asked for. At the end of the block the thread is over.

    Args:
        items: what another thread may make.
        wanted: False: the items as they are.
    """
    if not wanted:
        yield items
        return
    thread, end = ThreadPoolExecutor(1, "ahead"), object()

    def taken() -> Iterator[Item]:
        coming = deque(thread.submit(next, items, end) for _ in range(_DEPTH))
        item: Any
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item

    try:
        yield taken()
    finally:
        thread.shutdown(cancel_futures=True)

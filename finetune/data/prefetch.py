"""Prefetching: a thread makes the next items of an iterator while the current one is in use."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

DEPTH = 2
"""Items made ahead: one is enough where all take as long, two smooth what does not."""


@contextmanager
def ahead(items: Iterator[Item], *, allowed: Callable[[], bool] = lambda: True) -> Iterator[Iterator[Item]]:
    """Yield an iterator over `items`, the next two of which a thread prepares.

    What making one raises is raised where it is asked for. At the end of the block the thread is over.

    Args:
        items: what another thread may make.
        allowed: asked before each item; as long as it answers False, the items are made when they are asked for.
    """
    thread, end = ThreadPoolExecutor(1, "ahead"), object()

    def taken() -> Iterator[Item]:
        coming: deque[Future[Any]] = deque()
        while True:
            while len(coming) <= DEPTH and allowed():
                coming.append(thread.submit(next, items, end))
            item: Any = coming.popleft().result() if coming else next(items, end)
            if item is end:
                return
            yield item

    try:
        yield taken()
    finally:
        thread.shutdown(cancel_futures=True)

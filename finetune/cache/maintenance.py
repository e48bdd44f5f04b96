"""Maintenance of a cache folder: its contents, damaged items, and items that are no longer used."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from finetune.cache.disk import SHARDS, DiskStore, today
from finetune.cache.process_lock import WRITERS, dead
from finetune.errors import DataError

_AT_ONCE = 100
"""Items read between two looks at the index."""


class Contents(NamedTuple):
    """What is in a cache folder."""

    items: dict[str, int]
    """Kind -> how many."""
    shards: int
    bytes: int
    """Of all shards, those that the index does not know included."""
    unused: int
    """Days since the shard that was used least lately was used."""


def contents(store: DiskStore) -> Contents:
    """Count what is there; reads no shard."""
    items = dict(store.base.execute("SELECT kind, COUNT(*) FROM items GROUP BY kind ORDER BY kind DESC"))
    shards, oldest = store.base.execute("SELECT COUNT(*), MIN(used) FROM shards").fetchone()
    size = sum(file.stat().st_size for file in (store.folder / SHARDS).iterdir())
    return Contents(items, shards, size, today() - oldest if shards else 0)


def verify(store: DiskStore) -> tuple[int, list[str]]:
    """Read every item, and take those out of the index whose bytes are not what was written.

    Returns:
        How many are sound, and the keys of those that were taken out; the next run encodes these again.
    """
    (total,) = store.base.execute("SELECT COUNT(*) FROM items").fetchone()
    damaged: list[str] = []
    for keys in tqdm(_batches(store), "verifying", -(-total // _AT_ONCE), unit="", delay=3, leave=False):
        for key in keys:
            try:
                store.load([key])
            except DataError:
                damaged.append(key)
    with store.locked():
        store.base.executemany("DELETE FROM items WHERE key = ?", [(key,) for key in damaged])
    return total - len(damaged), damaged


def _batches(store: DiskStore) -> Iterator[list[str]]:
    """All keys, some at a time, shard by shard; what is written meanwhile may be left out."""
    shards = [row[0] for row in store.base.execute("SELECT id FROM shards ORDER BY id")]
    for shard in shards:
        keys = [row[0] for row in store.base.execute("SELECT key FROM items WHERE shard = ?", (shard,))]
        for start in range(0, len(keys), _AT_ONCE):
            yield keys[start : start + _AT_ONCE]


def prune(store: DiskStore, *, unused_days: int | None, max_bytes: float | None) -> int:
    """Delete whole shards, and what killed processes have left.

    Args:
        store: no run that reads from it should be under way: it would have to start again.
        unused_days: shards go that no run has used for so many days; 0: all. None: none for that.
        max_bytes: then those used least lately, until the rest is no larger than this.

    Returns:
        Bytes that were freed.
    """
    with store.locked():
        shards = store.base.execute("SELECT id, name, bytes, used FROM shards ORDER BY used DESC, id DESC").fetchall()
        filled = {row[0] for row in store.base.execute("SELECT DISTINCT shard FROM items")}
        referenced: set[str] = set()
        room = max_bytes if max_bytes is not None else float("inf")
        for shard, name, size, used in shards:
            old = unused_days is not None and today() - used >= unused_days
            room -= size
            if shard in filled and not old and room >= 0:
                referenced.add(name)
                continue
            store.base.execute("DELETE FROM items WHERE shard = ?", (shard,))
            store.base.execute("DELETE FROM shards WHERE id = ?", (shard,))
        files = [file for file in (store.folder / SHARDS).iterdir() if file.name not in referenced]
        doomed = [file for file in files if not _alive(store, file)]
        dead_writers = [file for file in (store.folder / WRITERS).glob("*") if dead(store.folder, file.name)]
        store.base.executemany("DELETE FROM claims WHERE writer = ?", [(file.name,) for file in dead_writers])
    freed = 0
    for file in doomed:  # the index has let go of them
        freed += file.stat().st_size
        file.unlink()
    for file in dead_writers:
        file.unlink()
    return freed


def _alive(store: DiskStore, file: Path) -> bool:
    """Whether it is a shard that a living process is writing (.NAME.safetensors.WRITER.part)."""
    fields = file.name.split(".")
    return fields[-1] == "part" and not dead(store.folder, fields[-2])

"""DiskStore: items in safetensors shards with a small index; shared between runs, and safe for several processes."""

import errno
import json
import os
import sqlite3
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save

from finetune.atomic_io import flush_to_disk
from finetune.cache.folder import cache_folder
from finetune.cache.process_lock import WRITERS, Writer, dead
from finetune.cache.store import Item, Kind, MemoryStore, Store
from finetune.errors import DataError, RunError, UsageError

INDEX = "index.sqlite3"
SHARDS = "shards"
FORMAT = 1
"""Of the index and the shards; a folder of another one is not touched."""

_TABLES = f"""
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, used INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS items (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, shard INTEGER NOT NULL, tensors TEXT NOT NULL, crc INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_of_shard ON items (shard);
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, writer TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""

_MOST_KEYS = 500
"""Keys in one query; SQLite takes at most 999 parameters in old builds."""

_MOST_OPEN = 64
"""Shards that are kept open for reading."""

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class DiskStore:
    """Items in a folder.

    A shard, named at random, is a safetensors file whose tensors are called KEY.NAME. It is written whole, and then
    belongs to the index, `index.sqlite3`, which knows for each key where its tensors lie and the checksum of their
    bytes. The index alone says what is there: a shard that it does not know is what a killed process has left.

    Reading checks the sum each time: what is damaged is never trained on.

    Args:
        folder: made if need be. One that cannot be written is read from.

    Raises:
        UsageError: it cannot be used, or a later version has written it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, _ShardFile] = {}
        self._writer: Writer | None = None
        try:
            if not (folder / INDEX).exists():
                (folder / SHARDS).mkdir(parents=True, exist_ok=True)
            needed = (folder, folder / SHARDS, folder / WRITERS, folder / INDEX)  # of which another user may own some
            self.writable = all(os.access(place, os.W_OK) for place in needed if place.exists())
            mode = "rwc" if self.writable else "ro"
            place = f"{(folder / INDEX).absolute().as_uri()}?mode={mode}"
            self.base = sqlite3.connect(place, uri=True, timeout=600, isolation_level=None, check_same_thread=False)
            (version,) = self.base.execute("PRAGMA user_version").fetchone()
            if version == 0 and self.writable:
                self.base.executescript(_TABLES)
            elif version != FORMAT:
                raise UsageError(f"cache_dir {folder}: written by another version (format {version}, not {FORMAT})")
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"cache_dir {folder}: {error}; give another --cache_dir, or none") from error

    def missing(self, keys: Iterable[str]) -> list[str]:
        distinct = list(dict.fromkeys(keys))
        present = {row[0] for row in self._rows("SELECT key FROM items WHERE key IN", distinct)}
        return [key for key in distinct if key not in present]

    def claim(self, keys: Sequence[str]) -> list[str]:
        """Claim keys as `Store.claim` does. Raises UsageError where the folder cannot be written."""
        writer = self._opened_writer()
        with self.locked():
            open_keys = self.missing(keys)
            held = self._rows("SELECT writer, key FROM claims WHERE key IN", open_keys)
            dead_writers = {name for name in {row[0] for row in held} if dead(self.folder, name)}
            self.base.executemany("DELETE FROM claims WHERE writer = ?", [(name,) for name in dead_writers])
            claimed = {key for name, key in held if name not in dead_writers and name != writer.name}
            mine = [key for key in open_keys if key not in claimed]
            self.base.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?)", [(key, writer.name) for key in mine])
        return mine

    def put(self, kind: Kind, items: Mapping[str, Item]) -> None:
        """Keep items as `Store.put` does. Raises RunError for a full disk, UsageError where it cannot be written."""
        if not items:
            return
        name = f"{uuid4().hex}.safetensors"
        scratch = self.folder / SHARDS / f".{name}.{self._opened_writer().name}.part"
        content = save({f"{key}.{part}": t.contiguous() for key, item in items.items() for part, t in item.items()})
        places = _places(content)
        rows = [(key, kind, *_row(places, key, item, content)) for key, item in items.items()]
        try:
            scratch.write_bytes(content)
            flush_to_disk(scratch)
            with self.locked():
                scratch.rename(self.folder / SHARDS / name)
                flush_to_disk(self.folder / SHARDS)
                shard = self.base.execute(
                    "INSERT INTO shards (name, bytes, used) VALUES (?, ?, ?)", (name, len(content), today())
                ).lastrowid
                self.base.executemany(
                    "INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?, ?)",
                    [(key, kind, shard, tensors, crc) for key, kind, tensors, crc in rows],
                )
                self.base.executemany("DELETE FROM claims WHERE key = ?", [(key,) for key in items])
        except OSError as error:
            raise self._failed(error) from error
        finally:
            scratch.unlink(missing_ok=True)

    def load(self, keys: Sequence[str]) -> list[Item]:
        """Read items as `Store.load` does. Raises DataError for an item that is damaged."""
        locations = {
            key: (shard, tensors, crc)
            for key, shard, tensors, crc in self._rows("SELECT key, shard, tensors, crc FROM items WHERE key IN", keys)
        }
        if missing := [key for key in keys if key not in locations]:
            raise DataError(f"cache_dir {self.folder}: an encoding is gone ({missing[0]}); start again")
        return [self._read(key, *locations[key]) for key in keys]

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            with self.locked():
                self.base.execute("DELETE FROM claims WHERE writer = ?", (self._writer.name,))
        finally:
            self._writer.close()
            self._writer = None

    def mark_used(self, keys: Sequence[str]) -> None:
        if not self.writable:
            return
        shards = {row[0] for row in self._rows("SELECT DISTINCT shard FROM items WHERE key IN", keys)}
        with self.locked():
            self.base.executemany("UPDATE shards SET used = ? WHERE id = ?", [(today(), shard) for shard in shards])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the index so that no other process writes to it; changes are committed unless an error is raised.

        Raises:
            RunError: the disk is full, or the index damaged.
        """
        try:
            with self.base:
                self.base.execute("BEGIN IMMEDIATE")
                yield
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunError:
        return RunError(f"cache_dir {self.folder}: {error}; what was encoded before is kept")

    def _rows(self, query: str, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """What a query that ends in IN finds, for any number of keys."""
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(keys), _MOST_KEYS):
            part = keys[start : start + _MOST_KEYS]
            try:
                rows += self.base.execute(f"{query} ({','.join('?' * len(part))})", tuple(part)).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from error
        return rows

    def _opened_writer(self) -> Writer:
        if not self.writable:
            raise UsageError(
                f"cache_dir {self.folder}: new encodings are needed, but it cannot be written; "
                "give another --cache_dir, or none"
            )
        if self._writer is None:
            try:
                self._writer = Writer(self.folder)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
                    what = f"cache_dir {self.folder}: its file system cannot lock files ({error.strerror})"
                    raise UsageError(f"{what}; give a --cache_dir on another one, or none") from error
                raise self._failed(error) from error
        return self._writer

    def _read(self, key: str, shard: int, tensors: str, crc: int) -> Item:
        entries = json.loads(tensors)
        pieces = [self._bytes(shard, begin, end) for _, _, _, begin, end in entries]
        if _checksum(pieces) != crc:
            raise DataError(
                f"cache_dir {self.folder}: an encoding is damaged ({key}); "
                f"finetune-unet cache verify --cache_dir {self.folder} deletes it, and the next run encodes it again"
            )
        return {
            name: torch.frombuffer(piece, dtype=_DTYPES[dtype]).reshape(shape)
            for (name, dtype, shape, _, _), piece in zip(entries, pieces, strict=True)
        }

    def _bytes(self, shard: int, begin: int, end: int) -> bytearray:
        """Bytes of a shard; fewer, if it was cut short; none, if it is gone."""
        file = self._files.get(shard)
        if file is None:
            ((name,),) = self.base.execute("SELECT name FROM shards WHERE id = ?", (shard,)).fetchall()
            try:
                file = self._files[shard] = _ShardFile(self.folder / SHARDS / name)
            except FileNotFoundError:
                return bytearray()
            for oldest in list(self._files)[:-_MOST_OPEN]:
                self._files.pop(oldest, None)  # another thread that still reads from it has a reference
        buffer = bytearray(end - begin)
        return buffer[: os.preadv(file.descriptor, [buffer], begin)]


class _ShardFile:
    """A shard that is open for reading, until nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def open_store(cache_dir: str | Path | None) -> Store:
    """The store that `--cache_dir` means, see `cache_folder`. Raises UsageError where its folder cannot be used."""
    folder = cache_folder(cache_dir)
    return MemoryStore() if folder is None else DiskStore(folder)


def existing_store(cache_dir: str | None) -> DiskStore:
    """The store in a cache folder, for what looks after it. Raises UsageError where there is none."""
    folder = cache_folder(cache_dir)
    if folder is None or not (folder / INDEX).exists():
        raise UsageError(f"cache_dir {folder or cache_dir}: no encodings are kept there")
    return DiskStore(folder)


def today() -> int:
    """Days since 1970."""
    return int(time.time() // 86400)


def _places(content: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """Read a safetensors header: tensor -> dtype, shape, and where its bytes lie in the file."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {
        name: (entry["dtype"], entry["shape"], *[8 + length + offset for offset in entry["data_offsets"]])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _row(places: Mapping[str, Any], key: str, item: Item, content: bytes) -> tuple[str, int]:
    """What the index says of an item: JSON of name, dtype, shape, begin and end of each tensor; the checksum."""
    entries = [(name, *places[f"{key}.{name}"]) for name in item]
    return json.dumps(entries), _checksum([content[begin:end] for *_, begin, end in entries])


def _checksum(pieces: Iterable[bytes | bytearray]) -> int:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc

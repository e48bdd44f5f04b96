"""ImageIndex: size and digest of files that earlier runs have read, so that unchanged files are not read again."""

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import UsageError

FILE = "pictures.sqlite3"
"""Its name in the cache folder."""

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, inode INTEGER NOT NULL, digest TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pictures (
    digest TEXT PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS splits (pictures TEXT PRIMARY KEY, held_out TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, inode INTEGER NOT NULL, content TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS shard_pictures (
    shard BLOB NOT NULL, number INTEGER NOT NULL, content TEXT NOT NULL, PRIMARY KEY (shard, number)
) WITHOUT ROWID;
"""


_VARIABLES = 500
"""In one query: every SQLite admits 999."""


class FileStamp(NamedTuple):
    """What tells, without reading it, that a file is the one that was read before."""

    size: int
    mtime: int
    """In nanoseconds."""
    inode: int

    @classmethod
    def read(cls, path: Path) -> "FileStamp":
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class IndexEntry(NamedTuple):
    """What is remembered of a file."""

    digest: str
    """Of its bytes."""
    size: tuple[int, int] | None
    """Width and height of the picture that it is; None: it was not decoded."""


def _is_damaged(base: sqlite3.Connection) -> bool:
    """Whether the file is no database, or a broken one; being locked for long is another matter."""
    try:
        (answer,) = base.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        return False
    except sqlite3.DatabaseError:
        return True
    return answer != "ok"


class ImageIndex:
    """A small database of pictures that could be read: file -> digest of its bytes -> width and height; and of what
    takes long to find about many: which are held out, and what lies in a shard.

    Threads may share it, and so may processes. What cannot be written is not remembered, and no harm is done.

    Args:
        folder: of the database; made if need be. One that cannot be written is read from.
        strict: trust no stamp: every file is hashed again.

    Raises:
        UsageError: the folder holds something else under its name, or cannot be made.
    """

    def __init__(self, folder: Path, *, strict: bool = False) -> None:
        self._strict, self._lock = strict, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writable = os.access(folder, os.W_OK)
            place = f"{(folder / FILE).absolute().as_uri()}?mode={'rwc' if self._writable else 'ro'}"
            if not self._writable and not (folder / FILE).exists():
                place = "file::memory:"
            self._base = sqlite3.connect(place, uri=True, timeout=60, check_same_thread=False)
            if self._writable and _is_damaged(self._base):
                self._base.close()
                (folder / FILE).unlink()  # what it knew is found out once more
                self._base = sqlite3.connect(place, uri=True, timeout=60, check_same_thread=False)
            if self._writable or not (folder / FILE).exists():
                self._base.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"cache_dir {folder}: {error}; give another --cache_dir, or none") from error

    def lookup(self, files: Sequence[tuple[Path, FileStamp]]) -> dict[tuple[Path, FileStamp], IndexEntry]:
        """What is known of the bytes that these files, a few hundred at most, had with these stamps; those that are
        not among it are new, or not to be trusted.
        """
        if self._strict or not files:
            return {}
        query = f"""
            SELECT path, files.size, mtime, inode, digest, width, height FROM files LEFT JOIN pictures USING (digest)
            WHERE path IN ({", ".join("?" * len(files))})
        """
        names = [_name(path) for path, _ in files]
        with self._lock:
            rows = self._base.execute(query, names).fetchall()
        entries = {(row[0], row[1:4]): IndexEntry(row[4], None if row[5] is None else row[5:]) for row in rows}
        asked = ((file, entries.get((name, file[1]))) for file, name in zip(files, names, strict=True))
        return {file: entry for file, entry in asked if entry}

    def digest(self, path: Path, stamp: FileStamp) -> str | None:
        """Return the digest that the file had with this stamp; None: not known, or not to be trusted."""
        entry = self.lookup([(path, stamp)]).get((path, stamp))
        return entry.digest if entry else None

    def size(self, digest: str) -> tuple[int, int] | None:
        """Width and height of the picture with these bytes; None: it was not decoded before."""
        row = self._row("SELECT width, height FROM pictures WHERE digest = ?", (digest,))
        return (row[0], row[1]) if row else None

    def note(
        self, files: Iterable[tuple[Path, FileStamp, str]], pictures: Iterable[tuple[str, tuple[int, int]]]
    ) -> None:
        """Remember the digests of files, and the sizes of pictures that were decoded in full."""
        if not self._writable:
            return
        rows = [(_name(path), *stamp, digest) for path, stamp, digest in files]
        sizes = [(digest, *size) for digest, size in pictures]
        with self._lock, contextlib.suppress(sqlite3.OperationalError), self._base:  # a full disk, or locked for long
            self._base.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)
            self._base.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", sizes)

    def split(self, key: str) -> list[int] | None:
        """Which pictures of a data set are held out, as was noted under this key; None: nothing was."""
        with contextlib.suppress(sqlite3.OperationalError):  # an older one that cannot be written has no such table
            row = self._row("SELECT held_out FROM splits WHERE pictures = ?", (key,))
            return json.loads(row[0]) if row else None
        return None

    def note_split(self, key: str, held_out: list[int]) -> None:
        """Remember it: to find it means to compare pictures with each other."""
        if self._writable:
            with self._lock, contextlib.suppress(sqlite3.OperationalError), self._base:
                self._base.execute("INSERT OR REPLACE INTO splits VALUES (?, ?)", (key, json.dumps(held_out)))

    def shard(self, path: Path, stamp: FileStamp) -> str | None:
        """What was noted of the shard with this stamp; None: nothing was, or it is not to be trusted."""
        if self._strict:
            return None
        query = "SELECT content FROM shards WHERE path = ? AND size = ? AND mtime = ? AND inode = ?"
        with contextlib.suppress(sqlite3.OperationalError):  # as for splits
            row = self._row(query, (_name(path), *stamp))
            return row[0] if row else None
        return None

    def shard_pictures(self, path: Path, numbers: Sequence[int] | None = None) -> list[str]:
        """What was noted of the pictures with these rising numbers, or of all, in a shard that `shard` knows."""
        query = "SELECT content FROM shard_pictures WHERE shard = ?"
        if numbers is None:
            queries = [(f"{query} ORDER BY number", ())]
        else:
            some = [numbers[at : at + _VARIABLES] for at in range(0, len(numbers), _VARIABLES)]
            queries = [(f"{query} AND number IN ({', '.join('?' * len(part))}) ORDER BY number", part) for part in some]
        with self._lock:
            return [row[0] for text, part in queries for row in self._base.execute(text, (_name(path), *part))]

    def note_shard(self, path: Path, stamp: FileStamp, content: str, pictures: Iterable[str]) -> None:
        """Remember what it holds in all, and each picture: to know that, all of its headers are read."""
        if not self._writable:
            return
        name = _name(path)
        with self._lock, contextlib.suppress(sqlite3.OperationalError), self._base:
            self._base.execute("DELETE FROM shard_pictures WHERE shard = ?", (name,))
            rows = ((name, number, picture) for number, picture in enumerate(pictures))
            self._base.executemany("INSERT INTO shard_pictures VALUES (?, ?, ?)", rows)
            self._base.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?)", (name, *stamp, content))

    def _row(self, query: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        with self._lock:
            return self._base.execute(query, values).fetchone()


def _name(path: Path) -> bytes:
    return os.fsencode(path.absolute())

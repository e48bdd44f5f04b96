"""Atomic writes: a file or folder is complete or absent (temporary sibling, fsync, rename)."""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from finetune.errors import UsageError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, never sees a part of it. Text is written as UTF-8."""
    with writing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, and to read again, which takes its place whole when the block ends."""
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w+b") as file:
        yield file
    flush_to_disk(scratch)
    os.replace(scratch, path)
    flush_to_disk(path.parent)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, which may be written to meanwhile; none where there is no file."""
    return list(each_json_line(path))


def each_json_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file of JSON lines one by one: there may be as many as a run has steps."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write what was measured at some steps, a line each, in the order of the steps."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda each: each["step"])))


def as_readable_as(path: Path, ordinary: Path) -> None:
    """Give a file the permissions of an ordinary one, where a library has made it private to the user.

    safetensors does, from 0.8 on: the web UI of another user, or in a container, could not load what was trained.
    File systems that have no permissions of files (FAT, CIFS) are left as they are.
    """
    with contextlib.suppress(PermissionError, NotImplementedError):
        path.chmod(stat.S_IMODE(ordinary.stat().st_mode))


def is_inside(path: Path, folder: Path) -> bool:
    """True where `path` lies, or would lie, in the existing `folder` or below it; links are followed."""
    return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())


def flush_to_disk(path: Path) -> None:
    """fsync a file or folder, so that a rename after it cannot become visible before its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (CIFS, FUSE) have no fsync of folders: their renames are as safe as they make them.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync a folder and everything in it, at any depth."""
    for path in [*folder.rglob("*"), folder]:
        flush_to_disk(path)


def remove(path: Path) -> None:
    """Delete a file or a folder; a folder is renamed first, so that a crash leaves no half of it under its name."""
    if doomed := _renamed_to_delete(path):
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def move_over(source: Path, target: Path) -> None:
    """Rename `source` to `target` and delete the file or folder that is there; both lie on one file system."""
    doomed = _renamed_to_delete(target)
    os.replace(source, target)
    if doomed:
        shutil.rmtree(doomed)


def _renamed_to_delete(path: Path) -> Path | None:
    """Rename a folder to a hidden name and return that name; None where `path` is no folder."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)  # what an earlier crash has left
    if not path.is_dir() or path.is_symlink():
        return None
    path.rename(doomed)
    return doomed


def new_file(option: str, place: str) -> Path:
    """A path to be written, in a folder that is there. Raises UsageError naming the option otherwise."""
    path = Path(place).expanduser()
    if path.exists() or path.is_symlink():
        raise UsageError(f"{option} {path} exists already; give another place")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.absolute().parent}")
    return path

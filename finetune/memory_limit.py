"""The main memory limit of this process: that of the machine, its container or its job."""

from pathlib import Path

import psutil

_V2, _V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def memory_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes in all.

    Args:
        root: where the system shows control groups.
        membership: the file that says in which of them this process is.
    """
    limits = [limit for limit, _ in _groups(root, membership)]
    return min([psutil.virtual_memory().total, *limits])


def memory_available(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that are free. The arguments are those of `memory_limit`."""
    left = [max(0, limit - used) for limit, used in _groups(root, membership)]
    return min([psutil.virtual_memory().available, *left])


def _groups(root: Path, membership: Path) -> list[tuple[int, int]]:
    """(limit, in use) of the control groups around this process that have a limit, in either version of them."""
    try:
        places = [line.rstrip("\n").split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:  # no Linux
        return []
    groups: list[tuple[int, int]] = []
    for _, controllers, path in places:
        top = root / "memory" if "memory" in controllers.split(",") else root
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            groups += [pair for names in (_V2, _V1) if (pair := _numbers(folder, names)) is not None]
            if folder == top:
                break
    return groups


def _numbers(folder: Path, names: tuple[str, str]) -> tuple[int, int] | None:
    try:
        limit, used = ((folder / name).read_text().strip() for name in names)
    except OSError:
        return None
    return (int(limit), int(used)) if limit.isdigit() and used.isdigit() else None

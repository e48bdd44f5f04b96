"""AllowedPaths: the folders that the page may show, as named when it was started."""

from collections.abc import Sequence
from pathlib import Path

from finetune.atomic_io import is_inside
from finetune.data.listing import SHARD_SUFFIX, is_picture
from finetune.errors import DataError, UsageError

_DEPTH, _MOST = 3, 200
"""How deep picture folders are looked for, and how many are offered."""
_DELETED = ".deleted"
"""In `runs/`: runs that were deleted on the page, and can be brought back."""


class AllowedPaths:
    """The folders that are open to the page.

    Args:
        data: in which pictures may lie.
        work: where commands run; its `runs` holds the run folders.
    """

    def __init__(self, data: Sequence[Path], work: Path) -> None:
        self.data = [folder.expanduser().resolve() for folder in data]
        self.work = work.expanduser().resolve()
        self.runs = self.work / "runs"
        if missing := [folder for folder in (self.work, *self.data) if not folder.is_dir()]:
            raise UsageError(f"{missing[0]}: no such folder")

    def picture_folders(self) -> list[str]:
        """Folders that hold pictures or shards of them, the nearest first."""
        folders: list[Path] = []
        level = list(self.data)
        for _ in range(_DEPTH):
            below: list[Path] = []
            for folder in level:
                try:
                    entries = sorted(folder.iterdir())
                except OSError:
                    continue
                if any(is_picture(entry.name) or entry.suffix.lower() == SHARD_SUFFIX for entry in entries):
                    folders.append(folder)
                below += [e for e in entries if e.is_dir() and not e.name.startswith(".") and self._is_open(e)]
            level = below[:_MOST]
        return [str(folder) for folder in folders[:_MOST]]

    def pictures(self, given: str) -> Path:
        """The folder or file of pictures that was chosen. Raises UsageError where it does not lie in one of `data`."""
        path = Path(given).expanduser().resolve()
        if not given or not self._is_open(path):
            allowed = ", ".join(map(str, self.data))
            raise UsageError(f"{given or 'no folder'}: expected what lies in {allowed} (--data of finetune-unet ui)")
        if path.suffix in (".toml", ".json"):
            raise UsageError(f"{given}: such a file may name folders that are not open; it is for the command line")
        return path

    def _is_open(self, path: Path) -> bool:
        """Whether it lies in one of `data`, links followed, and is not where the runs are."""
        path = path.resolve()
        return path != self.runs and any(path.is_relative_to(folder) for folder in self.data)

    def run_names(self) -> list[str]:
        """Names of the run folders, the newest first."""
        try:
            folders = [entry for entry in self.runs.iterdir() if self.is_run(entry.name)]
            return [folder.name for folder in sorted(folders, key=lambda path: -path.stat().st_mtime)]
        except OSError:  # not made yet, or one was deleted in between
            return []

    def is_run(self, name: str) -> bool:
        """Whether a run folder has this name."""
        path = self.runs / name / "samples"
        plain = name == Path(name).name and not name.startswith(".")
        return plain and path.is_dir() and is_inside(path, self.runs)

    def run(self, name: str | None) -> Path:
        """The run folder of this name. Raises UsageError where it is no name of one."""
        if not name or not self.is_run(name):
            raise UsageError(f"{name or 'no run'}: no run in {self.runs}")
        return self.runs / name

    def delete_run(self, name: str) -> None:
        """Move a run to runs/.deleted, from which `restore_run` brings it back.

        Raises:
            UsageError: it is no run.
            DataError: it cannot be moved.
        """
        run = self.run(name)
        deleted = self.runs / _DELETED
        try:
            deleted.mkdir(exist_ok=True)
            place = deleted / name
            number = 2
            while place.exists():
                place = deleted / f"{name}-{number}"
                number += 1
            run.rename(place)
        except OSError as error:
            raise DataError(f"{run}: {error.strerror}") from error

    def deleted_runs(self) -> list[str]:
        """The names of the runs that were deleted and are kept, the last one first."""
        try:
            entries = [entry for entry in (self.runs / _DELETED).iterdir() if entry.is_dir()]
            return [entry.name for entry in sorted(entries, key=lambda path: -path.stat().st_ctime)]
        except OSError:
            return []

    def restore_run(self, name: str) -> None:
        """Bring a deleted run back.

        Raises:
            UsageError: no run of this name was deleted, or there is another one by now.
            DataError: it cannot be moved.
        """
        if name not in self.deleted_runs():
            raise UsageError(f"{name}: no such run was deleted")
        if (self.runs / name).exists():
            raise UsageError(f"{name}: there is another run of this name; rename or delete it first")
        try:
            (self.runs / _DELETED / name).rename(self.runs / name)
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}") from error

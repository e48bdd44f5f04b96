"""What the machine has left: memory, disk, and GPUs."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import psutil

_QUERY = "name,memory.used,memory.total,utilization.gpu,temperature.gpu"
_AGE = 5.0
"""Seconds for which an answer of nvidia-smi, which takes a while, is shown."""


class Meter(NamedTuple):
    """A part of the machine in use."""

    name: str
    used: float
    total: float
    """In GB, as `used`."""
    note: str = ""

    @property
    def text(self) -> str:
        return f"{self.used:.1f} of {self.total:.1f} GB{', ' + self.note if self.note else ''}"


class Machine:
    """Reads what is in use.

    Args:
        work: folder on the disk that runs write to.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._gpus: list[Meter] = []
        self._asked = -_AGE
        self._nvidia_smi = shutil.which("nvidia-smi")

    def meters(self) -> list[Meter]:
        """The GPUs that nvidia-smi names, memory, and the disk."""
        memory, disk = psutil.virtual_memory(), shutil.disk_usage(self._work)
        return [
            *self._all_gpus(),
            Meter("Memory", (memory.total - memory.available) / 1e9, memory.total / 1e9),
            Meter("Disk", disk.used / 1e9, disk.total / 1e9, f"{disk.free / 1e9:.0f} GB free"),
        ]

    def _all_gpus(self) -> list[Meter]:
        if self._nvidia_smi and time.monotonic() - self._asked >= _AGE:
            self._asked = time.monotonic()
            words = [self._nvidia_smi, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
            try:
                printed = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout
            except (OSError, subprocess.TimeoutExpired):  # a driver that hangs
                printed = ""
            self._gpus = gpus_of(printed)
        return self._gpus


def gpus_of(printed: str) -> list[Meter]:
    """The GPUs in the output of nvidia-smi; a line that says [N/A] for its memory is left out."""
    meters = []
    for line in printed.splitlines():
        name, used, total, busy, heat = [*map(str.strip, line.split(",")), *[""] * 5][:5]
        if used.isdigit() and total.isdigit():
            note = ", ".join([f"{busy} % busy"] * busy.isdigit() + [f"{heat} °C"] * heat.isdigit())
            meters.append(Meter(name, int(used) * 2**20 / 1e9, int(total) * 2**20 / 1e9, note))
    return meters

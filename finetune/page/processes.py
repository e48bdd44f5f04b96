"""The commands that the page runs."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class CommandResult(NamedTuple):
    """What a command has printed."""

    ok: bool
    text: str


def command_line(words: Sequence[str]) -> str:
    """What a person would type."""
    return shlex.join(["finetune-unet", *words])


def run_command(words: Sequence[str], work: Path, *, timeout: float = 600) -> CommandResult:
    """Run a command that ends by itself, in the folder `work`; answers what it prints, or why it failed."""
    try:
        done = subprocess.run(
            argv(words), cwd=work, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return CommandResult(False, f"{command_line(words)}: no answer in {timeout:.0f} seconds")
    text = done.stdout if done.returncode == 0 else last_error_line(done.stderr)
    return CommandResult(done.returncode == 0, text)


def last_error_line(stderr: str) -> str:
    """The last line that is not a progress bar's."""
    lines = [line for line in _TERMINAL.sub("", stderr).replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


def argv(words: Sequence[str]) -> list[str]:
    """What starts the command with this Python."""
    return [sys.executable, "-m", "finetune", *words]

"""Command lines in shell, batch and PowerShell scripts and in notebooks: the program and its options."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UsageError

_VARIABLE = {
    "shell": re.compile(r"\$\{(\w+)\}|\$(\w+)"),
    "windows": re.compile(r"%(\w+)%"),
    "powershell": re.compile(r"\$env:(\w+)|\$(\w+)"),
    "notebook": re.compile(r"\{(\w+)\}|\$(\w+)"),
}
"""How each kind of file names a variable."""
_SET = {
    "shell": re.compile(r"^\s*(?:export\s+)?(\w+)=(.*)$"),
    "windows": re.compile(r"^\s*set\s+\"?(\w+)=(.*?)\"?\s*$", re.IGNORECASE),
    "powershell": re.compile(r"^\s*\$(?:env:)?(\w+)\s*=\s*(.*)$"),
    "notebook": re.compile(r"^\s*(\w+)\s*=\s*(.+?)(?:\s+#.*)?$"),
}
"""How a line of each kind gives a variable its value."""
_CONTINUED = {"shell": r"\\\r?\n", "windows": r"\^\r?\n", "powershell": r"`\r?\n", "notebook": r"\\\r?\n"}


@dataclass(frozen=True)
class CommandLine:
    """A Python script, and what it is given."""

    script: str
    """The name of its file."""
    options: Mapping[str, Any]
    """Name without dashes -> the word after it, several words, or True for a switch; words are as they were typed."""
    launcher: Mapping[str, Any]
    """The same of `accelerate launch`."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Option whose value is a variable that the file does not set -> the variable."""


def read_command_line(path: Path, text: str) -> CommandLine:
    """The first command line of a Python script in a file.

    Variables that the file sets are put in. Backslashes stay in files for Windows, whatever they stand before.

    Raises:
        UsageError: there is none, or its quotes do not match.
    """
    kind = _kind(path, text)
    if kind == "notebook":
        text = _cells(path, text)
    lines = re.sub(_CONTINUED[kind], " ", text).splitlines()
    variables: dict[str, str] = {}
    for line in lines:
        words = _words(path, line, kind)
        places = [number for number, word in enumerate(words) if word.endswith(".py")]
        if places and not line.lstrip().startswith(("#", "rem ", "REM ", "::")):
            filled = [_filled(word, variables, _VARIABLE[kind]) for word in words]
            return _split(filled, places[0])
        if given := _SET[kind].match(line):
            variables[given[1]] = _filled(given[2].strip().strip("\"'"), variables, _VARIABLE[kind])[0]
    raise UsageError(f"--file {path}: no command line of a Python script; .toml and .json files are read as such")


def _kind(path: Path, text: str) -> str:
    suffix = path.suffix.lower()
    if suffix == ".ipynb":
        return "notebook"
    if suffix == ".ps1":
        return "powershell"
    return "windows" if suffix in (".bat", ".cmd") or re.search(r"\^\r?\n", text) else "shell"


def _cells(path: Path, text: str) -> str:
    """The code of a notebook, without the marks in front of commands."""
    try:
        cells = json.loads(text)["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--file {path} is not a notebook: {error}") from error
    return re.sub(r"^\s*[!%]+", "", "\n".join(code), flags=re.MULTILINE)


def _words(path: Path, line: str, kind: str) -> list[str]:
    if kind in ("windows", "powershell"):
        words = re.findall(r'(?:[^\s"\']|"[^"]*"|\'[^\']*\')+', line)
        return [word.replace('"', "").replace("'", "") for word in words]
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        if ".py" not in line:  # a line of another program
            return []
        raise UsageError(f"--file {path}: {error}") from error


_Word = tuple[str, str]
"""A word with the values of variables in it, and a variable in it that has none ("": there is none such)."""


def _split(words: Sequence[_Word], place: int) -> CommandLine:
    unknown: dict[str, str] = {}
    options = _options(words[place + 1 :], unknown)
    launcher = _options(words[:place], {})
    script = re.split(r"[\\/]", words[place][0])[-1]
    return CommandLine(script, {name: v for name, v in options.items() if name not in unknown}, launcher, unknown)


def _options(words: Sequence[_Word], unknown: dict[str, str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    name = ""
    for word, missing in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given[name] = value if equals else True
        elif name:
            before = given[name]
            given[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
        if missing and name:
            unknown[name] = missing
    return given


def _filled(word: str, variables: Mapping[str, str], pattern: re.Pattern[str]) -> _Word:
    missing = ""

    def value(match: re.Match[str]) -> str:
        nonlocal missing
        name = next(group for group in match.groups() if group)
        missing = missing if name in variables else match[0]
        return variables.get(name, match[0])

    return pattern.sub(value, word), missing

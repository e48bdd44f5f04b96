"""Command-line parsing and `--help`, both generated from dataclass fields.

argparse draws `--help` and sorts the words under the options. What the words mean is read here, with the checks that a
TOML file and Python callers go through as well.
"""

import argparse
import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from finetune.config import fitted, readable, suggest
from finetune.errors import UsageError
from finetune.option_info import alternatives, info_of_field
from finetune.options import meanings

PROGRAM = "finetune-unet"

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)  # but neither -0.1 nor "--text with spaces"


def parse(sections: Mapping[str, type], argv: Sequence[str]) -> dict[str, Any]:
    """The options that are given in `argv`, by name. Raises UsageError for what is unknown, doubled or wrong.

    Args:
        sections: heading -> dataclass; each of its fields is an option, of type bool, int, float, str, Literal,
            `tuple[X, ...]` of these (several values, or the flag repeated), or any of them `| None`.
        argv: options only, without program and verb.
    """
    hints = {name: hint for kind in sections.values() for name, hint in typing.get_type_hints(kind).items()}
    fields = [field for kind in sections.values() for field in dataclasses.fields(kind)]
    several = {field.name for field in fields if info_of_field(field).several}
    parser = _parser(sections, PROGRAM, "")
    namespace, rest = parser.parse_known_args([part for word in argv for part in _parted(word)])
    if rest and not FLAG.fullmatch(rest[0]):
        raise UsageError(f"{rest[0]!r} follows no option; every value comes after its --option")
    if rest:
        raise _unknown([word.partition("=")[0] for word in rest if FLAG.fullmatch(word)], sections)
    return {name: _read(uses, hints[name], several=name in several) for name, uses in vars(namespace).items()}


def _unknown(flags: Sequence[str], sections: Mapping[str, type]) -> UsageError:
    """The error for options that there are not, with what may be meant; many of them are another tool's."""
    known = [f"--{name}" for kind in sections.values() for field in _fields(kind) for name in _names(*field)]
    meant = {flag: suggest("--" + flag.lstrip("-").replace("-", "_"), known) for flag in flags}
    if len(meant) == 1:
        ((flag, hint),) = meant.items()
        return UsageError(f"unknown option {flag}{hint}")
    hints = ", ".join(f"{flag} ({hint.removeprefix('; ')})" if hint else flag for flag, hint in meant.items())
    way = f"; {PROGRAM} import --file FILE takes another tool's command line or config over" if len(meant) > 2 else ""
    return UsageError(f"unknown options: {hints}{way}")


def _parted(word: str) -> tuple[str, ...]:
    """`--flag=value` as two words, where the value does not look like a flag itself: a list may go on after it."""
    flag, equals, value = word.partition("=")
    return (flag, value) if equals and FLAG.fullmatch(flag) and not value.startswith("-") else (word,)


class _Use(argparse.Action):
    """Notes each use of an option: the flag as typed, and the words up to the next flag."""

    def __call__(self, parser: Any, namespace: Any, words: Any, flag: Any = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), (flag, list(words))])


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows an option by its own name and the kind of value it takes, not by each of its spellings."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return str(action.metavar)


def _parser(sections: Mapping[str, type], prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of the sections' fields; values are words yet, options that are not given are left out."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options]",
        description=description,
        formatter_class=lambda prog: _Help(prog, max_help_position=36),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    for heading, kind in sections.items():
        group = parser.add_argument_group(f"{heading} options", kind.__doc__)
        texts = meanings(kind)
        for field, hint in _fields(kind):
            group.add_argument(
                *[f"--{spelling}" for name in _names(field, hint) for spelling in _with_dashes(name)],
                dest=field.name,
                nargs="*",
                action=_Use,
                metavar=f"--{field.name}{what_follows(field.name, hint)}",
                help=_help(field, texts.get(field.name, "")),
            )
    return parser


def show_help(sections: Mapping[str, type], prog: str, description: str) -> None:
    print(_parser(sections, prog, description).format_help(), end="")  # `print_help` hides that a reader has gone


def _fields(section: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a section with their type hints."""
    hints = typing.get_type_hints(section)
    return [(field, hints[field.name]) for field in dataclasses.fields(section)]


def _names(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    """What an option may be called: its name, that of other tools, and the `no_` form of a switch."""
    return [field.name, *info_of_field(field).aliases, *([f"no_{field.name}"] if bool in alternatives(hint) else [])]


def _with_dashes(name: str) -> set[str]:
    """The name as it is, with a dash for its first underscore (`no-use_ema`), and with dashes throughout."""
    return {name, name.replace("_", "-", 1), name.replace("_", "-")}


def what_follows(name: str, hint: Any) -> str:
    """The value after a flag, and the other form of a switch, for `--help`."""
    if bool not in alternatives(hint):
        return f" {_kind_of_value(hint)}"
    return f"{' [NUMBER]' if float in alternatives(hint) else ''}, --no_{name}"


def _kind_of_value(hint: Any) -> str:
    kind = next(kind for kind in alternatives(hint) if kind is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    if item := _item_hint(hint):
        return f"{_kind_of_value(item)} ..."
    return {int: "INT", float: "NUMBER", str: "TEXT"}[kind]


def _help(field: dataclasses.Field[Any], meaning: str) -> str:
    text = meaning.replace("%", "%%")  # argparse formats it
    if field.default is dataclasses.MISSING:
        return f"{text} (required)"
    return text if field.default in (None, "", ()) else f"{text} (default: {field.default})"


def _read(uses: list[tuple[str, list[str]]], hint: Any, *, several: bool = False) -> Any:
    """The value of an option from each of its uses: the flag as typed and the words after it."""
    (flag, words), *more = uses
    if more and not _item_hint(hint):
        one_option = f"{flag} and {more[0][0]} are one option: give one of them"
        raise UsageError(f"{flag} is given twice" if flag == more[0][0] else one_option)
    if bool in alternatives(hint):  # `--switch` and `--no-switch` stand for `--switch True` and `--switch False`
        positive = not re.match("--no[_-]", flag)
        if words and not positive:
            raise UsageError(f"{flag} takes no value, but {words[0]!r} follows")
        words = words or [str(positive)]
    if wordless := [flag for flag, some in [(flag, words), *more] if not some]:
        raise UsageError(f"{wordless[0]} needs a value ({readable(hint)})")
    if several and len(words) > 1:
        return [_value(flag, hint, [word]) for word in words]
    return _value(flag, hint, words + [word for _, some in more for word in some])


def _item_hint(hint: Any) -> Any | None:
    """X of `tuple[X, ...]`, also when `| None`; None for what is no list."""
    lists = [kind for kind in alternatives(hint) if typing.get_origin(kind) is tuple]
    return typing.get_args(lists[0])[0] if lists else None


def _value(flag: str, hint: Any, words: list[str]) -> Any:
    """The words after a flag as a value of the type hint."""
    if words == ["None"] and types.NoneType in alternatives(hint):  # takes back what a file says
        return None
    if item := _item_hint(hint):
        return tuple(_value(flag, item, [word]) for word in words)
    if len(words) > 1:
        raise UsageError(f"{flag} takes one value, but {words[1]!r} follows {words[0]!r}; put quotes around a text")
    try:
        return fitted(hint, _meant(hint, words[0]))
    except ValueError as error:
        raise UsageError(f"{flag} {words[0]}: {error}") from error


def _meant(hint: Any, word: str) -> Any:
    """The value that a word spells under the type hint; the word itself where it spells none; `fitted` refuses it."""
    for kind in alternatives(hint):
        if typing.get_origin(kind) is Literal:
            return next((choice for choice in typing.get_args(kind) if str(choice) == word), word)
        if kind is bool and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(word)
    return word

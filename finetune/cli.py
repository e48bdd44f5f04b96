"""The command `finetune-unet`: argv -> config -> recipe or a command. What goes wrong is told in one line.

tyro draws `--help` from the dataclasses and their docstrings. The words of the command line are read here, because
tyro reports errors in boxes, keeps only the last of a repeated list option, and knows no bare `--use_ema`.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import re
import select
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from finetune.config import (
    SECTIONS,
    TUTORIAL_NAMES,
    TrainConfig,
    alternatives,
    fitted,
    read_options,
    readable,
    suggest,
)
from finetune.errors import FinetuneError, UsageError
from finetune.models.families import FAMILIES

PROGRAM = "finetune-unet"

VERBS = {
    "sample": "draw pictures with a trained model",
    "preview": "see the pictures as training will see them",
}
"""First words that do something other than train -> what. Each is a module of `finetune.commands`."""

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it

_FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)  # but neither -0.1 nor "--text with spaces"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options from a file."""

    config: str | None = None
    """A TOML file, such as the config.toml of an earlier run. Options given as flags win over it."""


TRAIN_SECTIONS: dict[str, type] = {"file": FileOptions, **SECTIONS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for wrong usage, 1 for a failed run, 128 + n for signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    _prepare_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch([word for word in words if word != "--debug"])
        sys.stdout.flush()  # so that a reader who has gone is noticed here
    except FinetuneError as error:
        if "--debug" in words:
            traceback.print_exc()
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at exit would complain
        return _BROKEN_PIPE
    return code


def _prepare_environment() -> None:
    """Settings that libraries read when they are first imported; what the user has set stays."""
    # With another busy process on the machine, OpenMP threads that spin while they wait make a step 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tokenizing is over before workers are forked; without this the tokenizer warns about each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _stdout_is_gone() -> bool:
    """True when nobody reads our output any more (`| head`)."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(argv: list[str]) -> int:
    """Do what the words ask for and return the exit code."""
    if not argv:
        print(f"{_overview()}\n\nAll options: {PROGRAM} --help", file=sys.stderr)
        return UsageError.exit_code
    if "--version" in argv:
        print(PROGRAM, importlib.metadata.version(PROGRAM))
    elif argv[0] in VERBS:
        _run_verb(argv[0], argv[1:])
    elif not _FLAG.fullmatch(argv[0]):
        known = f"{suggest(argv[0], VERBS)} (commands: {', '.join(VERBS)}; options alone train)"
        raise UsageError(f"unknown command {argv[0]!r}{known}")
    elif _asks_for_help(argv):
        show_help(TRAIN_SECTIONS, PROGRAM, _overview())
    else:
        config = parse_train(argv)
        from finetune.recipe import fine_tune  # loads torch, which a wrong option need not wait for

        fine_tune(config)
    return 0


def _run_verb(verb: str, argv: list[str]) -> None:
    """Run `finetune.commands.<verb>` with the options that follow the verb."""
    command = importlib.import_module(f"finetune.commands.{verb}")
    sections = {verb: command.Options}
    if _asks_for_help(argv):
        show_help(sections, f"{PROGRAM} {verb}", f"{PROGRAM} {verb}: {VERBS[verb]}")
        return
    given = parse(sections, argv)
    for field in dataclasses.fields(command.Options):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not has_default and field.name not in given:
            raise UsageError(f"{verb} needs --{field.name}")
    command.run(command.Options(**given))


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The config that training options stand for: the file given by `--config` first, then the flags.

    Raises:
        UsageError: an unknown, doubled or wrong option, here or in the file.
    """
    given = parse(TRAIN_SECTIONS, argv)
    file = given.pop("config", None)
    return TrainConfig(**(read_options(Path(file)) | given if file else given))


def parse(sections: Mapping[str, type], argv: Sequence[str]) -> dict[str, Any]:
    """The options that are given in `argv`, by name. Raises UsageError for what is unknown, doubled or wrong.

    Args:
        sections: heading -> dataclass; each of its fields is an option, of type bool, int, float, str, Literal,
            `tuple[X, ...]` of these (several values, or the flag repeated), or any of them `| None`.
        argv: options only, without program and verb.
    """
    hints = {name: hint for kind in sections.values() for name, hint in typing.get_type_hints(kind).items()}
    spellings = _spellings(hints)
    given: dict[str, tuple[str, list[str]]] = {}
    for flag, words in _flags_with_words(argv):
        name, positive = _named(flag, spellings)
        if bool in alternatives(hints[name]):
            words = _switch_words(flag, positive, words)
        if not words:
            raise UsageError(f"{flag} needs a value ({readable(hints[name])})")
        earlier, collected = given.setdefault(name, (flag, []))
        if collected and not _item_hint(hints[name]):
            one_option = f"{earlier} and {flag} are one option: give one of them"
            raise UsageError(f"{flag} is given twice" if flag == earlier else one_option)
        collected.extend(words)
    return {name: _value(flag, hints[name], words) for name, (flag, words) in given.items()}


def _spellings(hints: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """What may stand after the dashes -> (option, False for the `no_` form of a switch)."""
    aliases = {alias: (name, True) for alias, name in TUTORIAL_NAMES.items() if name in hints}
    negated = {f"no_{name}": (name, False) for name, hint in hints.items() if bool in alternatives(hint)}
    return aliases | negated | {name: (name, True) for name in hints}


def _flags_with_words(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag as typed, with the words up to the next flag; `--flag=word` is a flag with a word."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if _FLAG.fullmatch(word):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UsageError(f"{word!r} follows no option; every value comes after its --option")
    return groups


def _named(flag: str, spellings: Mapping[str, tuple[str, bool]]) -> tuple[str, bool]:
    """The option that a flag means, and False for its `--no-` form."""
    spelling = flag.lstrip("-").replace("-", "_")
    if flag.startswith("--") and spelling in spellings:
        return spellings[spelling]
    raise UsageError(f"unknown option {flag}{suggest(f'--{spelling}', [f'--{known}' for known in spellings])}")


def _switch_words(flag: str, positive: bool, words: list[str]) -> list[str]:
    """The words of `--switch`, `--switch True` or `--no-switch`, as if it always had a value."""
    if words and not positive:
        raise UsageError(f"{flag} takes no value, but {words[0]!r} follows")
    return words or [str(positive)]


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
        if kind is bool:
            return {"true": True, "false": False}.get(word.lower(), word)
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(word)
    return word


def show_help(sections: Mapping[str, type], prog: str, description: str) -> None:
    """Print the usage, the description, and the options of each section with their defaults."""
    import tyro

    fields = [(heading, _as_shown(kind)) for heading, kind in sections.items()]
    with contextlib.suppress(SystemExit):  # how tyro ends its help
        tyro.cli(
            dataclasses.make_dataclass("Options", fields),
            prog=prog,
            description=description,
            args=["--help"],
            use_underscores=True,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        )


def _as_shown(section: type) -> type:
    """The section without `(default: None)`: what happens when an option is left out is in its docstring."""
    import tyro

    hints = typing.get_type_hints(section)
    quiet = tyro.conf.arg(help_behavior_hint="")
    unset = [
        (field.name, Annotated[hints[field.name], quiet], field)
        for field in dataclasses.fields(section)
        if field.default in (None, "", ())
    ]
    return dataclasses.make_dataclass(
        section.__name__, unset, bases=(section,), namespace={"__doc__": section.__doc__}, frozen=True, kw_only=True
    )


def _overview() -> str:
    """What the command does, in one screenful. (tyro adds blank lines before an indented line that follows one.)"""
    verbs = "\n".join(f"  {name:<9}{text}" for name, text in VERBS.items())
    families = "\n".join(
        f"  {family.name:<9}{family.description}; {family.resolution} pixels" for family in FAMILIES.values()
    )
    return f"""\
Teach the UNet of a Stable Diffusion your pictures:
  {PROGRAM} --model sd15 --data ./images --prompt "a butterfly"

Other commands ({PROGRAM} COMMAND --help):
{verbs}

Models (--model; a hub id or a diffusers folder works too):
{families}

Also --version, and --debug for the traceback of an error."""

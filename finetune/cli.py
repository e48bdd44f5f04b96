"""The command `finetune-unet`: argv -> config -> recipe or a command. What goes wrong is told in one line.

argparse draws `--help` and sorts the words under the options; both come from the sections' fields. What the words mean
is read here, with the checks that a TOML file and Python callers go through as well.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import logging
import os
import re
import select
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from finetune.about import about_field
from finetune.config import TrainConfig, alternatives, fitted, read_options, readable, suggest
from finetune.data.source import check_sources
from finetune.errors import INTERRUPTED, Elsewhere, FinetuneError, Interrupted, UsageError
from finetune.models.families import FAMILIES
from finetune.models.locate import check_name
from finetune.options import SECTIONS, about, meanings

PROGRAM = "finetune-unet"

VERBS = {
    "sample": "draw pictures with a trained model",
    "export": "write what a run has learned as another kind of file",
    "preview": "see the pictures as training will see them",
    "ui": "start, watch and compare runs in a browser",
    "compare": "runs side by side on one page",
    "plan": "what training would do and take, before it starts",
    "inspect": "see what one step of a run was made of",
    "import": "another tool's settings as a config.toml",
    "convert": "a pickled checkpoint (.ckpt) as .safetensors",
    "cache encode": "encode what training with the same options would need",
    "cache info": "what encodings are kept, and their size",
    "cache verify": "read every encoding and take out what is damaged",
    "cache prune": "delete encodings that are not used any more",
    "lora info": "what a LoRA file holds",
    "lora convert": "write a LoRA file in the other layout",
    "lora merge": "put LoRA files into a model",
    "lora resize": "write a LoRA of lower rank",
    "lora extract": "the difference of two models as a LoRA",
}
"""First words that do something other than train -> what. Each is a module of `finetune.commands`."""

GROUPS = {"cache": "on encodings that are kept", "lora": "on LoRA files"}
"""First words that take a second one."""

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
        if _is_told_elsewhere(error):
            return error.exit_code
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain(INTERRUPTED, 130)
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
    # peft imports bitsandbytes where it is installed, which warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Tokenizing is over before workers are forked; without this the tokenizer warns about each of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if _rank() > 0:  # one process tells
        os.environ.setdefault("TQDM_DISABLE", "1")


def _is_told_elsewhere(error: FinetuneError) -> bool:
    """Whether the first of the processes that train together says the same."""
    same = isinstance(error, (Elsewhere, Interrupted)) or "torch" not in sys.modules  # a word that nobody understands
    return _rank() > 0 and same


def _rank() -> int:
    """Which process this is of those that accelerate or torchrun have launched."""
    return int(os.environ.get("RANK") or 0)


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
        print(f"{_overview()} All options: {PROGRAM} --help", file=sys.stderr)
        return UsageError.exit_code
    if "--version" in argv:
        print(PROGRAM, importlib.metadata.version(PROGRAM))
    elif group := [verb for verb in VERBS if verb.startswith(f"{argv[0]} ") and argv[1:] in (["--help"], ["-h"])]:
        print("\n".join(f"{PROGRAM} {verb:<14}{VERBS[verb]}" for verb in group))
    elif verb := _verb(argv):
        _run_verb(verb, argv[len(verb.split()) :])
    elif not _FLAG.fullmatch(argv[0]):
        words = list(dict.fromkeys(verb.split()[0] for verb in VERBS))
        known = f"{suggest(argv[0], words)} (commands: {', '.join(words)}; options alone train)"
        raise UsageError(f"unknown command {argv[0]!r}{known}")
    elif _asks_for_help(argv):
        _show_help(TRAIN_SECTIONS, PROGRAM, _overview())
    else:
        config = parse_train(argv)
        check_name(config.model)
        if config.resume_from_checkpoint is None:
            check_sources(config.data)
        from finetune.recipe import fine_tune  # loads torch, which a wrong option, model or folder need not wait for

        fine_tune(config)
    return 0


def _verb(argv: list[str]) -> str | None:
    """The command that the first word names, or the first two. Raises UsageError for the first of two alone."""
    groups = [verb for verb in VERBS if verb.split()[0] == argv[0]]
    if not groups or groups == argv[:1]:
        return argv[0] if groups else None
    verb = " ".join(argv[:2])
    if verb not in VERBS:
        actions = ", ".join(group.split()[1] for group in groups)
        raise UsageError(f"{argv[0]} takes a command after it: {actions}{suggest(verb, groups)}")
    return verb


def _run_verb(verb: str, argv: list[str]) -> None:
    """Run `finetune.commands.<verb>` with the options that follow the verb."""
    command = importlib.import_module(f"finetune.commands.{verb.replace(' ', '_')}")
    trains = getattr(command, "WITH_TRAINING_OPTIONS", False)
    sections = {verb: command.Options} | (TRAIN_SECTIONS if trains else {})
    if _asks_for_help(argv):
        _show_help(sections, f"{PROGRAM} {verb}", f"{PROGRAM} {verb}: {VERBS[verb]}")
        return
    given = parse(sections, argv)
    own = {field.name: given.pop(field.name) for field in dataclasses.fields(command.Options) if field.name in given}
    for field in dataclasses.fields(command.Options):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not has_default and field.name not in own:
            raise UsageError(f"{verb} needs --{field.name}")
    command.run(command.Options(**own), *([_config(given)] if trains else []))


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The config that training options stand for: the file given by `--config` first, then the flags.

    Raises:
        UsageError: an unknown, doubled or wrong option, here or in the file.
    """
    return _config(parse(TRAIN_SECTIONS, argv))


def _config(given: dict[str, Any]) -> TrainConfig:
    """The config of what was given as flags, over what is in the file that they name."""
    file = given.pop("config", None)
    options = _over(given, read_options(Path(file))) if file else given
    sources = options.get("data", ())
    if len(sources) == 1 and sources[0].endswith(".toml"):
        from finetune.commands.foreign.sd_scripts import read_dataset

        taken = read_dataset(Path(sources[0]))
        for line in (*taken.notes, *(f"not taken over: {setting}: {why}" for setting, why in taken.left.items())):
            print(f"{sources[0]}: {line}")
        options = taken.ours | {name: value for name, value in options.items() if name != "data"}
    return TrainConfig(**options)


def _over(flags: dict[str, Any], of_file: dict[str, Any]) -> dict[str, Any]:
    """The options of a file under those that are given as flags. A length as a flag replaces both kinds of the file."""
    lengths = {name for name, known in about().items() if known.change == "length"}
    replaced = lengths if lengths & flags.keys() else set[str]()
    return {name: value for name, value in of_file.items() if name not in replaced} | flags


def parse(sections: Mapping[str, type], argv: Sequence[str]) -> dict[str, Any]:
    """The options that are given in `argv`, by name. Raises UsageError for what is unknown, doubled or wrong.

    Args:
        sections: heading -> dataclass; each of its fields is an option, of type bool, int, float, str, Literal,
            `tuple[X, ...]` of these (several values, or the flag repeated), or any of them `| None`.
        argv: options only, without program and verb.
    """
    hints = {name: hint for kind in sections.values() for name, hint in typing.get_type_hints(kind).items()}
    parser = _parser(sections, PROGRAM, "")
    namespace, rest = parser.parse_known_args([part for word in argv for part in _parted(word)])
    if rest and not _FLAG.fullmatch(rest[0]):
        raise UsageError(f"{rest[0]!r} follows no option; every value comes after its --option")
    if rest:
        flag = rest[0].partition("=")[0]
        known = [f"--{name}" for kind in sections.values() for field in _fields(kind) for name in _names(*field)]
        raise UsageError(f"unknown option {flag}{suggest('--' + flag.lstrip('-').replace('-', '_'), known)}")
    return {name: _read(uses, hints[name]) for name, uses in vars(namespace).items()}


def _parted(word: str) -> tuple[str, ...]:
    """`--flag=value` as two words, where the value does not look like a flag itself: a list may go on after it."""
    flag, equals, value = word.partition("=")
    return (flag, value) if equals and _FLAG.fullmatch(flag) and not value.startswith("-") else (word,)


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
                metavar=f"--{field.name}{_what_follows(field.name, hint)}",
                help=_help(field, texts.get(field.name, "")),
            )
    return parser


def _show_help(sections: Mapping[str, type], prog: str, description: str) -> None:
    print(_parser(sections, prog, description).format_help(), end="")  # `print_help` hides that a reader has gone


def _fields(section: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a section with their type hints."""
    hints = typing.get_type_hints(section)
    return [(field, hints[field.name]) for field in dataclasses.fields(section)]


def _names(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    """What an option may be called: its name, that of other tools, and the `no_` form of a switch."""
    return [field.name, *about_field(field).names, *([f"no_{field.name}"] if bool in alternatives(hint) else [])]


def _with_dashes(name: str) -> set[str]:
    """The name as it is, with a dash for its first underscore (`no-use_ema`), and with dashes throughout."""
    return {name, name.replace("_", "-", 1), name.replace("_", "-")}


def _what_follows(name: str, hint: Any) -> str:
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


def _read(uses: list[tuple[str, list[str]]], hint: Any) -> Any:
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


def _overview() -> str:
    """What the command does, in one screenful."""
    told: dict[str, str] = {}
    for verb, text in VERBS.items():
        first, _, second = verb.partition(" ")
        told[first] = f"{told[first]}, {second}" if first in told else f"{GROUPS[first]}: {second}" if second else text
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in told.items())
    own = {family.name: f"{family.description}; {family.resolution} pixels" for family in FAMILIES.values()}
    for name in [name for name, family in FAMILIES.items() if family.inpainting]:  # in the line of what they come from
        del own[name]
        own[name.removesuffix("-inpainting")] += f"; {name}"
    families = "\n".join(f"  {name:<10}{text}" for name, text in own.items())
    return f"""\
Teach the UNet of a Stable Diffusion your pictures:
  {PROGRAM} --model sd15 --data ./images --prompt "a butterfly"

Other commands ({PROGRAM} COMMAND --help):
{verbs}
Models (--model; a hub id or a diffusers folder works too):
{families}
Also --version, and --debug for the traceback of an error."""

"""The command `finetune-unet`: argv -> config -> recipe or a command. Errors are one line."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from finetune.arguments import FLAG, PROGRAM, parse, show_help
from finetune.config import TrainConfig, read_options, suggest
from finetune.data.data_source import check_sources
from finetune.errors import INTERRUPTED, Elsewhere, FinetuneError, Interrupted, UsageError
from finetune.log_handlers import PACKAGE, JsonHandler, TextHandler, install
from finetune.models.families import FAMILIES
from finetune.models.model_info import check_name
from finetune.options import SECTIONS, option_info

VERBS = {
    "sample": "draw images with a trained model",
    "export": "write the result of a run in another format",
    "check": "name images that are unreadable, small, blurred or shown twice",
    "preview": "show images as training will see them",
    "ui": "start, watch and compare runs in a browser",
    "compare": "compare runs on one page",
    "plan": "show what training would do and need",
    "inspect": "rebuild and show one step of a run",
    "import": "convert another tool's settings to config.toml",
    "convert": "convert a pickled checkpoint (.ckpt) to .safetensors",
    "cache encode": "encode what training with the same options needs",
    "cache info": "show cached encodings and their size",
    "cache verify": "find and delete damaged encodings",
    "cache prune": "delete unused encodings",
    "lora info": "show the contents of a LoRA file",
    "lora convert": "convert a LoRA file to the other format",
    "lora merge": "merge LoRA files into a model",
    "lora resize": "reduce the rank of a LoRA",
    "lora extract": "write the difference of two models as a LoRA",
}
"""Command -> what it does. Each is a module of `finetune.commands`."""

SYNONYMS = {
    "generate": "sample",
    "infer": "sample",
    "draw": "sample",
    "gui": "ui",
    "webui": "ui",
    "merge": "lora merge",
}
"""Other words for a command -> the command that is suggested."""

_TINY = (
    "no --model was given, so this is tiny: 64 px, for trying things out, and it knows nothing but drawn shapes; "
    "for photographs give --model sd15 or --model sdxl"
)

_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 124 stopped by --max_train_minutes, 128 + n stopped by signal n."
)

_log = logging.getLogger(__name__)

GROUPS = {"cache": "on cached encodings", "lora": "on LoRA files"}
"""First words of commands of two words."""

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options from a file, and messages."""

    config: str | None = None
    """TOML file, such as the config.toml of an earlier run. Flags take precedence over it."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log on standard output: lines of text, or one JSON object per line for container platforms."""


TRAIN_SECTIONS: dict[str, type] = {"file": FileOptions, **SECTIONS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for wrong usage, 1 for a failed run, 128 + n for signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    if importlib.util.find_spec("fcntl") is None:
        return _complain("runs on Linux, macOS and in WSL; Windows has no POSIX file locks", 2)
    _prepare_environment()
    install(TextHandler())
    if _rank() > 0:  # the main process logs what all of them do
        PACKAGE.setLevel(logging.ERROR)
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
    if _rank() > 0:  # the main process shows its own
        os.environ.setdefault("TQDM_DISABLE", "1")


def _is_told_elsewhere(error: FinetuneError) -> bool:
    """Whether the first of the processes that train together says the same."""
    same = isinstance(error, (Elsewhere, Interrupted)) or "torch" not in sys.modules  # a word that nobody understands
    return _rank() > 0 and same


def _rank() -> int:
    """Which process this is of those that accelerate or torchrun have launched."""
    return int(os.environ.get("RANK") or 0)


def _complain(message: str, code: int) -> int:
    if any(isinstance(handler, JsonHandler) for handler in PACKAGE.handlers):
        _log.error(message)
    else:
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
        print(_overview(), file=sys.stderr)
        return UsageError.exit_code
    argv = _understood(argv)
    if "--version" in argv:
        print(PROGRAM, importlib.metadata.version(PROGRAM))
    elif group := [verb for verb in VERBS if verb.startswith(f"{argv[0]} ") and argv[1:] in (["--help"], ["-h"])]:
        print("\n".join(f"{PROGRAM} {verb:<14}{VERBS[verb]}" for verb in group))
    elif verb := _verb(argv):
        _run_verb(verb, argv[len(verb.split()) :])
    elif not FLAG.fullmatch(argv[0]):
        words = list(dict.fromkeys(verb.split()[0] for verb in VERBS))
        meant = f"; did you mean {SYNONYMS[argv[0]]}?" if argv[0] in SYNONYMS else suggest(argv[0], words)
        hint = f"{meant} (commands: {', '.join(words)}; options alone train)"
        raise UsageError(f"unknown command {argv[0]!r}{hint}")
    elif _asks_for_help(argv):
        show_help(TRAIN_SECTIONS, PROGRAM, f"{_overview()}\n{_EXIT_CODES}")
    else:
        given = parse(TRAIN_SECTIONS, argv)
        if given.get("log_format") == "json":
            install(JsonHandler())
        file = given.get("config")
        _train(_config(given), Path(file) if file else None)
    return 0


def _understood(argv: list[str]) -> list[str]:
    """The words as they are meant: `train` and `help` in front, or a folder of pictures alone."""
    if argv[0] == "train":
        return argv[1:] or ["--help"]
    if argv[0] == "help":
        return [*argv[1:], "--help"]
    is_verb = any(verb.split()[0] == argv[0] for verb in VERBS)
    return argv if is_verb or not Path(argv[0]).is_dir() else ["--data", *argv]


def _train(config: TrainConfig, file: Path | None) -> None:
    """Train as the config says, which may come from a file."""
    check_name(config.model)
    if config.resume_from_checkpoint is None:
        check_sources(config.data)
    from finetune.recipe import fine_tune  # loads torch, which a wrong option, model or folder need not wait for

    by_default = "model" not in config.given and config.resume_from_checkpoint is None
    if by_default:
        _log.warning(_TINY)
    fine_tune(config, repeats=file)
    if by_default:
        _log.warning(_TINY)


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
        show_help(sections, f"{PROGRAM} {verb}", f"{PROGRAM} {verb}: {VERBS[verb]}")
        return
    given = parse(sections, argv)
    own_options = {
        field.name: given.pop(field.name) for field in dataclasses.fields(command.Options) if field.name in given
    }
    for field in dataclasses.fields(command.Options):
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if not has_default and field.name not in own_options:
            raise UsageError(f"{verb} needs --{field.name}")
    command.run(command.Options(**own_options), *([_config(given)] if trains else []))


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
    given.pop("log_format", None)
    options = _over(given, read_options(Path(file))) if file else given
    sources = options.get("data", ())
    if len(sources) == 1 and sources[0].endswith((".toml", ".json")):
        from finetune.commands.foreign.sd_scripts_dataset import read_dataset

        imported = read_dataset(Path(sources[0]))
        for line in (
            *imported.notes,
            *(f"not taken over: {setting}: {why}" for setting, why in imported.skipped.items()),
        ):
            _log.warning("%s: %s", sources[0], line)
        options = imported.ours | {name: value for name, value in options.items() if name != "data"}
    return TrainConfig(**options)


def _over(flags: dict[str, Any], of_file: dict[str, Any]) -> dict[str, Any]:
    """The options of a file under those that are given as flags. A length as a flag replaces both kinds of the file."""
    lengths = {name for name, info in option_info().items() if info.affects == "length"}
    replaced = lengths if lengths & flags.keys() else set[str]()
    return {name: value for name, value in of_file.items() if name not in replaced} | flags


def _overview() -> str:
    """What the command does, in one screenful."""
    rows: dict[str, str] = {}
    for verb, text in VERBS.items():
        first, _, second = verb.partition(" ")
        rows[first] = f"{rows[first]}, {second}" if first in rows else f"{GROUPS[first]}: {second}" if second else text
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in rows.items())
    own = {family.name: f"{family.description}; {family.resolution} pixels" for family in FAMILIES.values()}
    for name, family in FAMILIES.items():
        if family.variant_of:
            del own[name]
            own[family.variant_of] += f"; {name}"
    families = "\n".join(f"  {name:<10}{text}" for name, text in own.items())
    return f"""\
Fine-tune the UNet of Stable Diffusion on your images:
  {PROGRAM} --model sd15 --data ./images --prompt "a butterfly"

Options: --help; also --version, and --debug for tracebacks. Commands ({PROGRAM} COMMAND --help):
{verbs}
Models (--model; also a hub id or a diffusers folder):
{families}"""

"""Errors, each one line: what is wrong, where, and what to do. The command maps them to exit codes."""

from typing import cast


class FinetuneError(Exception):
    """Base of every error that is told to the user in one line."""

    exit_code = 1


class UsageError(FinetuneError):
    """An option, a value or a path that cannot work; nothing has been started."""

    exit_code = 2


class DataError(FinetuneError):
    """The pictures or captions cannot be trained on."""


class ModelError(FinetuneError):
    """A model folder is incomplete, unknown or out of reach."""


class RunError(FinetuneError):
    """Training or export failed; what was saved before is still there."""


class Elsewhere(RunError):
    """Another of the processes that train together has ended; it says why itself."""


class Interrupted(FinetuneError):
    """The run was stopped from outside, by a signal (exit code 128 + its number) or the clock (124).

    A checkpoint was written before.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


INTERRUPTED = "interrupted"
"""What the command says when a signal ends it at once."""


def first_line(error: Exception) -> str:
    """What a library says, as far as it fits into a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the hub refuses or is out of reach, whichever HTTP library it is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)

"""What can go wrong, said in one line: what is wrong, where, and what to do. The command makes them exit codes."""

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
    """A signal stopped the run after a checkpoint was written; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the hub refuses or is out of reach, whichever HTTP library it is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)

"""The command line as a server on standard input: it imports the libraries once, and answers looks and plans at once.

Importing torch and diffusers takes seconds, which each of them would wait for.
"""

import contextlib
import io
import json
import os
import sys
import threading

from finetune.cli import main
from finetune.page.processes import CommandResult, last_error_line

_IDLE_SECONDS = 120
"""After which the process ends: it may hold memory of the GPU, which runs need."""


def answer(words: list[str]) -> CommandResult:
    """Run a command in this process."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(words)
    return CommandResult(code == 0, printed.getvalue() if code == 0 else last_error_line(errors.getvalue()))


def serve() -> None:
    """Answer the commands on standard input, a JSON list a line, until it is closed or idle for long."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    import finetune.commands.plan
    import finetune.recipe  # noqa: F401

    while line := _line_in_time():
        answers.write(json.dumps(answer(json.loads(line))._asdict()) + "\n")
        answers.flush()


def _line_in_time() -> str:
    """The next line of standard input; the process ends where none comes for long."""
    ending = threading.Timer(_IDLE_SECONDS, os._exit, [0])
    ending.daemon = True
    ending.start()
    try:
        return sys.stdin.readline()
    finally:
        ending.cancel()


if __name__ == "__main__":
    serve()

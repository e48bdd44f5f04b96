"""The page as the command serves it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Serve a folder of images and runs; gives the address with its token, and the process, ended by Ctrl-C."""
    command = [sys.executable, "-m", "finetune", "ui", "--data", str(folder), "--work", str(folder), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found
        yield found[0], server
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        server.wait(20)

"""finetune-unet ui: a page to start, watch and compare runs in a browser."""

import importlib.util
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a page that starts, watches and compares runs. It runs this command and reads run folders: closing it stops
    no run."""

    data: tuple[str, ...] = (".",)
    """Folders in which pictures may lie; the page shows nothing outside of them but runs."""
    work: str = "."
    """Where runs are started: they lie in its runs/."""
    host: str = "127.0.0.1"
    """Address to listen at. Visitors need the token that is part of the printed address."""
    port: int = 7860
    """Port to listen at."""
    open: bool = False
    """Open the page in a browser."""


def run(options: Options) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: a folder is not there, the port is in use, or gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("ui needs a package: pip install 'finetune-unet[ui]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask the network
    from finetune.page.allowed_paths import AllowedPaths

    places = AllowedPaths([Path(folder) for folder in options.data], Path(options.work))
    from finetune.page.app import Page, build
    from finetune.page.serving import serve

    token = secrets.token_urlsafe(16)
    serve(build(Page(places)), host=options.host, port=options.port, token=token, open_browser=options.open)

"""finetune-unet ui: a page that starts, watches and compares runs in a browser."""

import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a page that starts, watches and compares runs. Runs are separate processes: closing the page stops none."""

    data: tuple[str, ...] = (".",)
    """Folders that may contain images; the page shows nothing else except runs."""
    work: str = "."
    """Folder where runs are started; they are written to its runs/."""
    host: str = "127.0.0.1"
    """Address to listen on. Visitors need the token in the printed address."""
    port: int = 7860
    """Port to listen on; 0: any that is free."""
    gpus: tuple[str, ...] = ()
    """Numbers of the GPUs that the queue uses, a run on each; none: one run at a time."""
    open: bool = False
    """Open the page in a browser."""


def run(options: Options) -> None:
    """Serve until Ctrl-C.

    Raises:
        UsageError: a folder is not there, the port is in use, or a package is not installed.
    """
    if missing := [name for name in ("starlette", "uvicorn", "jinja2") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"ui needs {', '.join(missing)}: pip install 'finetune-unet[ui]'")
    from finetune.page.allowed_paths import AllowedPaths

    places = AllowedPaths([Path(folder) for folder in options.data], Path(options.work))
    from finetune.page.app import Page, build
    from finetune.page.serving import serve

    token = secrets.token_urlsafe(16)
    page = build(Page(places, options.gpus))
    serve(page, host=options.host, port=options.port, token=token, open_browser=options.open)

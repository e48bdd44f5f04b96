"""finetune-unet ui: a page that starts, watches and compares runs in a browser."""

import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.page.visitors import Visitor


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
    users: str | None = None
    """TOML file with the tokens of several people: [users] who may change things, [viewers] who may look."""
    view_link: bool = False
    """Also print an address at which the page can be looked at, but nothing changed."""
    allowed_hosts: tuple[str, ...] = ()
    """Other names of this machine, such as that of a proxy in front of the page."""
    certificate: str | None = None
    """PEM file of a certificate, for TLS. Needs private_key."""
    private_key: str | None = None
    """PEM file of the certificate's key."""
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
    from finetune.page.serving import Certificate, serve
    from finetune.page.visitors import AuditLog

    if (options.certificate is None) != (options.private_key is None):
        raise UsageError("--certificate and --private_key: give both, or none")
    files = [Path(file).expanduser() for file in (options.certificate, options.private_key) if file]
    serve(
        build(Page(places, options.gpus)),
        host=options.host,
        port=options.port,
        visitors=_visitors(options),
        hosts=options.allowed_hosts,
        audit=AuditLog(places.runs / ".queue/audit.jsonl"),
        tls=Certificate(*files) if files else None,
        open_browser=options.open,
    )


def _visitors(options: Options) -> "dict[str, Visitor]":
    """Who may see the page, by their tokens."""
    from finetune.page.visitors import Visitor, read_visitors

    visitors = read_visitors(Path(options.users).expanduser()) if options.users else {}
    if not visitors:
        visitors[secrets.token_urlsafe(16)] = Visitor("")
    if options.view_link:
        visitors[secrets.token_urlsafe(16)] = Visitor("viewers", may_change=False)
    return visitors

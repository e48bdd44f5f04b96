"""Serving the page to clients that have its token."""

import resource
import socket
import ssl
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from finetune.errors import UsageError
from finetune.page.guard import App, Guard
from finetune.page.visitors import AuditLog, Visitor

_OPEN_FILES = 8192


@dataclass(frozen=True)
class Certificate:
    """What TLS needs: PEM files."""

    certificate: Path
    private_key: Path


def serve(
    page: App,
    *,
    host: str,
    port: int,
    visitors: Mapping[str, Visitor],
    hosts: Sequence[str] = (),
    audit: AuditLog | None = None,
    tls: Certificate | None = None,
    open_browser: bool = False,
) -> None:
    """Serve until Ctrl-C, and print an address for each visitor.

    Args:
        page: what is served.
        host, port: to listen at; port 0: any that is free.
        visitors: token -> who has it.
        hosts: other names of this machine, such as that of a proxy.
        audit: takes the requests that may change something.
        tls: None: without, as a proxy or this machine alone needs it.
        open_browser: show the first address at once.

    Raises:
        UsageError: nothing can listen there, or a file of `tls` cannot be read.
    """
    guard = Guard(page, visitors=visitors, hosts=(host, *hosts), audit=audit, secure=tls is not None)
    # A browser that watches a run keeps a connection open, for which Ctrl-C would wait.
    config = uvicorn.Config(guard, log_level="warning", timeout_graceful_shutdown=1)
    if tls:
        config.ssl_certfile, config.ssl_keyfile = str(tls.certificate), str(tls.private_key)
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"--certificate and --private_key: {error}") from error
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port {port} at {host}: {error}; give another") from error
    name = "localhost" if host.startswith("127.") else socket.gethostname() if host == "0.0.0.0" else host
    address = f"{'https' if tls else 'http'}://{name}:{listening.getsockname()[1]}/"
    for token, visitor in visitors.items():
        whose = f" of {visitor.name}" if visitor.name else ""
        print(
            f"the page{whose} is at {address}?token={token}{'' if visitor.may_change else ' (to look at)'}", flush=True
        )
    if open_browser:
        threading.Timer(1.0, webbrowser.open, [f"{address}?token={next(iter(visitors))}"]).start()
    _allow_many_connections()
    uvicorn.Server(config).run(sockets=[listening])


def _allow_many_connections() -> None:
    """Raise the limit of open files, of which each connection is one: clients that send nothing would use it up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

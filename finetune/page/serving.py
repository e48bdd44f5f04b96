"""Serving the page to clients that have its token."""

import socket
import threading
import webbrowser

import uvicorn

from finetune.errors import UsageError
from finetune.page.guard import App, Guard


def serve(page: App, *, host: str, port: int, token: str, open_browser: bool = False) -> None:
    """Serve until Ctrl-C.

    Args:
        page: what is served.
        host, port: to listen at; port 0: any that is free.
        token: that visitors have to give, in the address that is printed.
        open_browser: show it at once.

    Raises:
        UsageError: nothing can listen there.
    """
    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port {port} at {host}: {error}; give another") from error
    name = "localhost" if host.startswith("127.") else socket.gethostname() if host == "0.0.0.0" else host
    address = f"http://{name}:{listening.getsockname()[1]}/?token={token}"
    print(f"the page is at {address}", flush=True)
    if open_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    # A browser that watches a run keeps a connection open, for which Ctrl-C would wait.
    config = uvicorn.Config(Guard(page, token=token, host=host), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])

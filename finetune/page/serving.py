"""Serving the page to clients that have its token."""

import socket
import threading
import webbrowser

import gradio as gr
import uvicorn
from starlette.applications import Starlette

from finetune.errors import UsageError
from finetune.page.guard import App, Guard
from finetune.page.views import STYLE


def guarded(blocks: gr.Blocks, *, host: str, token: str) -> App:
    """The page as an ASGI application behind its `Guard`."""
    page = gr.mount_gradio_app(
        Starlette(),  # pyright: ignore[reportArgumentType] # a FastAPI is one, and nothing more is used of it
        blocks,
        path="/",
        ssr_mode=False,
        footer_links=[],
        theme=_theme(),
        css=STYLE,
        max_file_size=0,
    )
    return Guard(page, token=token, host=host)


def serve(blocks: gr.Blocks, *, host: str, port: int, token: str, open_browser: bool = False) -> None:
    """Serve until Ctrl-C.

    Args:
        blocks: the page.
        host, port: to listen at.
        token: that visitors have to give, in the address that is printed.
        open_browser: show it at once.

    Raises:
        UsageError: nothing can listen there.
    """
    _check_free(host, port)
    name = "localhost" if host.startswith("127.") else socket.gethostname() if host == "0.0.0.0" else host
    address = f"http://{name}:{port}/?token={token}"
    print(f"the page is at {address}", flush=True)
    if open_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    page = guarded(blocks, host=host, token=token)
    # A browser that watches a run keeps a connection open, for which Ctrl-C would wait.
    uvicorn.run(page, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)  # pyright: ignore[reportArgumentType]


def _theme() -> gr.themes.Base:
    """Fonts that need no network, and colours of enough contrast (WCAG 2.2, 1.4.3)."""
    dark_blue, light_blue = "#0b6e99", "#7cc9ec"
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        color_accent=dark_blue,
        slider_color=dark_blue,
        slider_color_dark=light_blue,
        button_primary_background_fill=dark_blue,
        button_primary_background_fill_dark=dark_blue,
        button_primary_background_fill_hover="#084f6e",
        button_primary_background_fill_hover_dark="#084f6e",
        button_primary_text_color="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise UsageError(f"--port {port} at {host}: {error}; give another") from error

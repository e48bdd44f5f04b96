"""Serving the page: to this machine, or to others with a token."""

import socket
import time

import gradio as gr

from finetune.errors import UsageError
from finetune.page.views import STYLE

USER = "finetune"


def serve(blocks: gr.Blocks, *, host: str, port: int, token: str | None, open_browser: bool = False) -> None:
    """Serve until Ctrl-C.

    Args:
        blocks: the page.
        host, port: to listen at.
        token: that visitors have to give; None: they need none.
        open_browser: show it at once.

    Raises:
        UsageError: nothing can listen there.
    """
    _check_free(host, port)
    blocks.launch(
        server_name=host,
        server_port=port,
        auth=(USER, token) if token else None,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=_theme(),
        css=STYLE,
    )
    print(f"the page is at http://{'localhost' if host.startswith('127.') else host}:{port}", flush=True)
    if token:
        print(f"user {USER}, token {token}", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        blocks.close(verbose=False)


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

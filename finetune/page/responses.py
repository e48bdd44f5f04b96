"""What the handlers of the page share: templates, forms and server-sent events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

_POLL_SECONDS = 0.5
LARGEST_FORM = 65536
"""Bytes of a form; what is larger is refused."""


class Templates:
    """The HTML templates of the page."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=PackageLoader("finetune.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )

    def render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)

    def answer(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.render(template, **values), status)


def stream(version: Callable[[], object], parts: Callable[[], Mapping[str, str]]) -> StreamingResponse:
    """Server-sent events: each of `parts` by its name, at once and whenever `version` changes."""

    async def events() -> AsyncIterator[str]:
        last: object = None
        while True:
            now = await run_in_threadpool(version)
            if now != last:
                last = now
                for name, html in (await run_in_threadpool(parts)).items():
                    lines = "".join(f"data: {line}\n" for line in html.splitlines())
                    yield f"event: {name}\n{lines}\n"
            await asyncio.sleep(_POLL_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def posted(
    do: Callable[[Mapping[str, str]], Response], *, largest: int = LARGEST_FORM
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that calls `do` with the fields of a form.

    Args:
        do: what is done.
        largest: bytes of the form. The endpoint raises HTTPException for a larger one.
    """

    async def endpoint(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > largest:
                raise HTTPException(413, f"a form of more than {largest} bytes")
        fields = dict(parse_qsl(body.decode("utf-8", errors="replace"), keep_blank_values=True))
        return await run_in_threadpool(do, fields)

    return endpoint

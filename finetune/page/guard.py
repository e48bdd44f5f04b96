"""Access to the page: a browser that has the token, and that does not embed the page elsewhere."""

import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from finetune.page.visitors import AuditLog, Visitor

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADERS = {
    "x-frame-options": "DENY",
    "content-security-policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # not no-referrer, with which browsers send the forms of the page with the Origin "null"
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware that lets through what comes from the page's own browser.

    A request needs the token: in the query of the first one (`/?token=...`), which answers with a cookie, and in that
    cookie from then on. Its Host must be this machine's (or a site could resolve its own name to it), and its Origin,
    if it has one, the page itself (or another page could press the buttons). No answer may be shown in a frame.

    Args:
        app: the page.
        visitors: token -> who has it.
        hosts: names that are allowed as Host, besides those of this machine.
        audit: takes the requests that may change something.
        secure: whether browsers may send the cookie through TLS alone.
    """

    def __init__(
        self,
        app: App,
        *,
        visitors: Mapping[str, Visitor],
        hosts: Sequence[str] = (),
        audit: AuditLog | None = None,
        secure: bool = False,
    ) -> None:
        self._app, self._visitors, self._audit, self._secure = app, dict(visitors), audit, secure
        self._hosts = {"localhost", socket.gethostname(), socket.getfqdn(), *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(headers)
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if refused is not None:
            await self._refuse(scope, send, 403, refused)
        elif scope["type"] == "http" and self._visitor(given):
            cookie = self._cookie(headers["host"], given)
            await _answer(send, 303, "", {"location": scope["path"], "set-cookie": cookie})
        elif (visitor := self._visitor(_cookies(headers).get(_name(headers["host"]), ""))) is None:
            await self._refuse(scope, send, 401, "open the address that finetune-unet ui has printed, with its token")
        elif scope.get("method") in ("GET", "HEAD"):
            await self._app(scope, receive, _with_headers(send))
        elif not visitor.may_change:
            await self._refuse(scope, send, 403, "this address shows runs and images, and changes nothing")
        else:
            if self._audit:
                self._audit.write(visitor.name, scope["path"])
            await self._app(scope, receive, _with_headers(send))

    def _refused(self, headers: dict[str, str]) -> str | None:
        """Why a request is not for the page, whoever sends it; None: it may be."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return f"host {host!r} is not this machine"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"origin {origin!r} is another page"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return "another page asks"
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this machine: by a name of it, or by an address, which nobody can redirect."""
        name = urlsplit(f"//{host}").hostname or ""
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _visitor(self, given: str) -> Visitor | None:
        """Who has this token; every token is compared, in constant time."""
        found = [
            visitor
            for token, visitor in self._visitors.items()
            if secrets.compare_digest(given.encode(), token.encode())
        ]
        return found[0] if found else None

    def _cookie(self, host: str, token: str) -> str:
        return f"{_name(host)}={token}; HttpOnly; SameSite=Strict; Path=/{'; Secure' if self._secure else ''}"

    async def _refuse(self, scope: Scope, send: Send, status: int, why: str) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _answer(send, status, f"finetune-unet: {why}\n", {})


def _name(host: str) -> str:
    """Return the cookie's name with the port in it: browsers send the cookies of one port to every other."""
    return f"finetune_token_{urlsplit(f'//{host}').port or 80}"


def _cookies(headers: dict[str, str]) -> dict[str, str]:
    return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in message.get("headers", [])}
            added = [(name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in own]
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    said = {"content-type": "text/plain; charset=utf-8", **_HEADERS, **headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in said.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": text.encode()})

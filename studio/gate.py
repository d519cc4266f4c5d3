"""What every request passes before it reaches a page: origin, login, the owner of an upload; and the headers put on
every answer.

An ASGI middleware, since FastAPI's own kind would hold back the streams that pages are updated by.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from threading import Lock
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Auth
from .config import is_loopback
from .errors import PermissionDenied

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'",  # charts compile their drawing code: unsafe-eval
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_OPEN = frozenset({"/login", "/favicon.ico", "/health"})
_EXACT = frozenset({"/", "/config", "/config/", "/theme.css", "/robots.txt", "/manifest.json", "/logout"})
_BELOW = ("/assets/", "/static/", "/svelte/", "/files/")
_GRADIO = (
    "info",
    "queue/",
    "call/",
    "upload",
    "heartbeat/",
    "cancel",
    "reset",
    "startup-events",
    "login_check",
    "app_id",
    "file=",
)
"""What the page and `gradio_client` ask for. Whatever else Gradio answers (proxies, deep links, monitoring, developer
routes) is not served."""


class Uploads:
    """Whose an uploaded file is. Gradio's own store gives every file to everybody who knows its path."""

    def __init__(self):
        self._owners: dict[str, set[str]] = {}
        self._lock = Lock()

    def add(self, user: str, paths: Iterable[str]) -> None:
        with self._lock:
            for path in paths:  # the same content of two users lies at one path
                self._owners.setdefault(os.path.realpath(path), set()).add(user)

    def owns(self, user: str, path: str) -> bool:
        return user in self._owners.get(os.path.realpath(path), ())

    def check(self, user: str, paths: Iterable[str]) -> list[str]:
        """The paths, all uploaded by this user.

        Raises:
            PermissionDenied: one was not.
        """
        found = list(paths)
        if not all(self.owns(user, path) for path in found):
            raise PermissionDenied("This file was not uploaded by you, or the studio was restarted: upload it again.")
        return found


class Gate:
    def __init__(self, app: ASGIApp, auth: Auth, uploads: Uploads):
        self.app, self.auth, self.uploads = app, auth, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            request = Request(scope)
            user = self.auth.owner(request)
            answer = self._refusal(request, user)
            recorded = self._recorded(request, user, _with_headers(send))
            await (answer or self.app)(scope, receive, recorded)

    def _refusal(self, request: Request, user: str | None) -> Response | None:
        """The answer to a request that must not pass; None lets it through."""
        path = request.scope["path"]
        if self.auth.users is None and not is_loopback(_host(request)):
            return _no(403, "The studio answers under its own address only: open it as http://127.0.0.1.")
        if request.method not in ("GET", "HEAD") and not _same_origin(request):
            return _no(403, "This request came from another site.")
        if path in _OPEN:
            return None
        if user is None:
            asks_page = path == "/" and request.method == "GET"
            where = "/login" + (f"?next={quote('/?' + request.url.query)}" if request.url.query else "")
            return RedirectResponse(where, 303) if asks_page else _no(401, "Please log in.")
        below = path.removeprefix("/gradio_api/")
        if path not in _EXACT and not path.startswith(_BELOW) and not (below != path and below.startswith(_GRADIO)):
            return _no(404, "There is nothing here.")
        if below.startswith("file=") and not self.uploads.owns(user, below.removeprefix("file=")):
            return _no(403, "This file is not yours.")
        return None

    def _recorded(self, request: Request, user: str | None, send: Send) -> Send:
        """Note who uploaded what, from the answer, before the browser learns the path."""
        if user is None or request.method != "POST" or request.scope["path"] != "/gradio_api/upload":
            return send
        body = bytearray()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    self.uploads.add(user, _paths(bytes(body)))
            await send(message)

        return noting


def _with_headers(send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message["headers"] if name not in _NAMES]
            message = {**message, "headers": [*kept, *_ENCODED]}
        await send(message)

    return adding


_ENCODED = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
_NAMES = {name for name, _ in _ENCODED} | {b"access-control-allow-origin", b"access-control-allow-credentials"}


def _host(request: Request) -> str:
    """The host that the browser believes to talk to; a foreign name that resolves to this machine is refused."""
    return urlsplit("//" + request.headers.get("host", "")).hostname or ""


def _same_origin(request: Request) -> bool:
    """Whether a changing request comes from our own page, or from no browser at all."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _paths(body: bytes) -> list[str]:
    try:
        found = json.loads(body)
    except ValueError:
        return []
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []


def _no(status: int, message: str) -> Response:
    return JSONResponse({"detail": message}, status)

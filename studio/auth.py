"""Login: a page, a signed cookie that outlives the server, and a brake on guessing.

The cookie says who and until when. Its key is made of the studio's secret and the user's password hash, so that a new
password or a removed user ends every session, and nothing has to be kept on the server.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import secrets
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup

from .users import Users
from .workspace import ME

COOKIE = "veneer_session"
LIFETIME = 30 * 24 * 3600
"""Seconds until a login is asked for again."""
CHECKS = 2
"""Passwords looked at at a time. Each takes 16 MB, which its thread keeps."""
FORM_LIMIT = 4096
"""Bytes of a login form, far above any name and password."""
_PAGE = Markup((Path(__file__).parent / "views" / "login.html").read_text(encoding="utf-8"))


class Throttle:
    """At most `limit` failures in `window` seconds for each key, be it a name or an address."""

    def __init__(self, limit: int = 6, window: float = 60.0):
        self.limit, self.window = limit, window
        self._failures: dict[str, deque[float]] = {}
        self._lock = Lock()

    def wait(self, *keys: str) -> int:
        """Seconds until another try is allowed; 0 for now."""
        with self._lock:
            blocked = [times for key in keys if len(times := self._recent(key)) >= self.limit]
            return max((int(times[0] + self.window - time.monotonic()) + 1 for times in blocked), default=0)

    def failed(self, *keys: str) -> None:
        with self._lock:
            for key in list(self._failures):
                self._recent(key)  # forgets what is over, so that made-up names do not pile up
            for key in keys:
                self._failures.setdefault(key, deque(maxlen=self.limit)).append(time.monotonic())

    def _recent(self, key: str) -> deque[float]:
        times = self._failures.get(key, deque())
        while times and times[0] < time.monotonic() - self.window:
            times.popleft()
        if not times:
            self._failures.pop(key, None)
        return times


class Auth:
    """Who is asking. Without a users file it is always `ME`, and there is no login."""

    def __init__(self, secret: bytes, users: Users | None):
        self.secret, self.users = secret, users
        self.throttle = Throttle()
        self._checks = ThreadPoolExecutor(CHECKS, "login")

    def owner(self, request: Request) -> str | None:
        """The user of a request; None for nobody."""
        if self.users is None:
            return ME
        return self.read(request.cookies.get(COOKIE, ""))

    def cookie(self, user: str) -> str:
        """A session's cookie: the user, the end, and a signature over both."""
        content = f"{_encode(user.encode())}.{int(time.time()) + LIFETIME}"
        return f"{content}.{self._sign(user, content)}"

    def read(self, cookie: str) -> str | None:
        """The user whom a cookie names, if it is whole, ours, and not over."""
        content, _, signature = cookie.rpartition(".")
        name, _, end = content.partition(".")
        try:
            user, over = _decode(name).decode(), int(end) < time.time()
        except ValueError:
            return None
        known = self.users is not None and user in self.users.records()
        return user if known and not over and hmac.compare_digest(signature, self._sign(user, content)) else None

    def _sign(self, user: str, content: str) -> str:
        record = self.users.records()[user] if self.users else ""
        key = hmac.digest(self.secret, record.encode(), "sha256")
        return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()

    def add_routes(self, app: FastAPI) -> None:
        """`/login` and `/logout`."""

        @app.get("/login")
        def page(request: Request) -> Response:
            return _page(_target(request.query_params.get("next")))

        @app.post("/login")
        async def enter(request: Request) -> Response:
            form = parse_qs((await _body(request)).decode(errors="replace"))
            name, password, target = (form.get(key, [""])[0] for key in ("name", "password", "next"))
            address = request.client.host if request.client else ""
            tried = (name, password, _target(target), f"from {address}", _is_https(request))
            return await asyncio.get_running_loop().run_in_executor(self._checks, self._enter, *tried)

        @app.post("/logout")
        def leave() -> Response:
            response = RedirectResponse("/login", status_code=303)
            response.delete_cookie(COOKIE)
            return response

    def _enter(self, name: str, password: str, target: str, address: str, https: bool) -> Response:
        if self.users is None:
            return RedirectResponse("/", status_code=303)
        if seconds := self.throttle.wait(f"as {name}", address):
            message = f"Too many wrong tries. Wait {seconds} seconds, then try again."
            return _page(target, message, name, 429, {"Retry-After": str(seconds)})
        if not self.users.check(name, password):
            self.throttle.failed(f"as {name}", address)
            return _page(target, "This name and password do not belong together. Please check both.", name, 401)
        response = RedirectResponse(target, status_code=303)
        response.set_cookie(COOKIE, self.cookie(name), LIFETIME, httponly=True, samesite="lax", secure=https)
        return response


def load_secret(path: Path) -> bytes:
    """The studio's secret, made on the first start and readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return path.read_bytes()


def _page(target: str, message: str = "", name: str = "", status: int = 200, headers: dict | None = None) -> Response:
    said = Markup('<p class="said" role="alert">{}</p>').format(message) if message else ""
    return HTMLResponse(_PAGE.format(said=said, name=name[:80], next=target), status, headers)


def _target(asked: str | None) -> str:
    """Where to go after the login: this page with its query, never another host."""
    return "/?" + query if asked and (query := urlsplit(asked).query) else "/"


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_LIMIT:
            return b""
    return body


def _is_https(request: Request) -> bool:
    return request.url.scheme == "https"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

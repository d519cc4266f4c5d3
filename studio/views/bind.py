"""From a click to a handler: who clicked, and what happens if it cannot be done.

A handler is `function(desk, *values)`, or `function(desk, data, *values)` bound with `data=True` where the event
carries something. It returns the outputs' values in their order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from ..errors import StudioError
from ..gate import Uploads
from ..users import Users
from ..workspace import Workspace

logger = logging.getLogger(__name__)
Handler = Callable[..., Any]


class Desk(NamedTuple):
    """Whose work it is, and where it lies."""

    ws: Workspace
    user: str
    uploads: Uploads
    users: Sequence[str] = ()
    """Everybody who may log in, whoever runs the studio first; empty without login."""

    def own(self, paths: Sequence[str] | str | None) -> list[str]:
        """Uploaded files, if this user uploaded them."""
        return self.uploads.check(self.user, [paths] if isinstance(paths, str) else paths or [])


class Binder:
    """Binds handlers of one studio; every handler is private, cheap, and so never waits for another one."""

    def __init__(self, ws: Workspace, uploads: Uploads, users: Users | None = None):
        self.ws, self.uploads, self.users = ws, uploads, users

    def desk(self, request: gr.Request) -> Desk:
        """The desk of whoever sent a request; the gate has let nobody else through."""
        user = request.username
        if not user:
            raise StudioError("You are logged out. Reload the page and log in again.")
        return Desk(self.ws, user, self.uploads, list(self.users.records()) if self.users else ())

    def on(
        self,
        events: Callable[..., Any] | Sequence[Callable[..., Any]],
        handler: Handler | None,
        inputs: Any = None,
        outputs: Any = None,
        *,
        data: bool = False,
        **more: Any,
    ) -> Any:
        """Call `handler` at each of `events`, such as `button.click`."""
        bound = None
        for event in [events] if callable(events) else events:
            fixed = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"} | more
            count = len(outputs) if isinstance(outputs, (list, tuple)) else int(outputs is not None)
            fn = None if handler is None else self._spoken(handler, count, data)
            bound = event(fn, inputs, outputs, **fixed)
        return bound

    def _spoken(self, handler: Handler, count: int, data: bool) -> Handler:
        """`handler` for Gradio; what goes wrong becomes a message in plain words and leaves the page as it is."""

        def run(request: gr.Request, event: gr.EventData, *values: Any) -> Any:
            try:
                return handler(self.desk(request), *([event._data or {}] if data else []), *values)
            except StudioError as error:
                gr.Warning(str(error), title="That did not work")
            except Exception:
                logger.exception("%s failed", handler.__name__)
                gr.Warning(
                    "The studio made a mistake; its log says which. Nothing is lost: reload the page, then try again.",
                    title="That did not work",
                )
            return [gr.skip()] * count if count > 1 else gr.skip() if count else None

        run.__name__ = f"page_{handler.__name__}"  # Gradio's name for it, which must not take that of a public function
        return run

"""A job that a tab waits for: its progress, a way to stop it, and what is shown in the end. A reload finds it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from markupsafe import Markup

from ..errors import NotFound
from ..jobs import store
from ..services import drafts
from . import html
from .bind import Desk
from .page import Page

EVERY = 1.0
"""Seconds between looks."""


class Watch:
    """Place it where the progress shall be; `result`, created elsewhere, shows what `show(desk, job)` says of it."""

    def __init__(self, page: Page, tab: str, name: str, show: Callable[[Desk, store.Job], Markup], result: gr.HTML):
        self.page, self.name, self.show = page, name, show
        self.job, self.seen = gr.State(""), gr.State("")
        self.status = gr.HTML(elem_id=f"{name}-status", js_on_load=html.CLICKS)
        self.timer = gr.Timer(EVERY, active=False)
        self._shown = [self.job, self.status, result, self.timer, self.seen]
        page.on(self.timer.tick, self.look, [self.job, self.seen], self._shown)
        page.on(self.status.click, self.stop, [self.job], [self.status], data=True)
        page.on_open(tab, self.found, [], self._shown)

    def on(self, event: Any, start: Callable[..., str], inputs: Any) -> Any:
        """At `event`, `start(desk, *inputs)` begins a job and gives its id, or "" where none was needed."""

        def begin(desk: Desk, *values: Any) -> Any:
            job = start(desk, *values)
            drafts.save(desk.ws, desk.user, f"{self.name}_job", {"job": job})
            return self.look(desk, job, "")

        begin.__name__ = start.__name__
        return self.page.on(event, begin, inputs, self._shown)

    def found(self, desk: Desk) -> Any:
        """The job that was watched last, as it stands."""
        return self.look(desk, drafts.load(desk.ws, desk.user, f"{self.name}_job").get("job", ""), "")

    def look(self, desk: Desk, job: str, seen: str) -> list[Any]:
        try:
            now = store.owned(desk.ws, desk.user, job)
        except NotFound:
            return ["", "", gr.skip(), gr.Timer(active=False), ""]
        stamp = f"{now.id} {now.state} {now.step} {now.position} {now.message}"
        if stamp == seen:
            return [gr.skip()] * 5
        return [job, status(now), self.show(desk, now), gr.Timer(active=now.active), stamp]

    def stop(self, desk: Desk, data: dict[str, Any], job: str) -> Any:
        store.request(desk.ws, desk.user, job, "stop_now")
        return status(store.owned(desk.ws, desk.user, job))


def status(job: store.Job) -> Markup:
    """State, progress and a way to stop: what a job does, or how it ended."""
    if job.state == "done":
        return Markup()
    return html.html(
        '<div class="line">{badge} {stop}</div>{bar}{said}',
        badge=html.badge(job.state),
        stop=html.button("Stop", "stop", f"Stop this {job.kind}") if job.active else "",
        bar=html.progress(job.step, job.total, f"Progress of the {job.kind}") if job.active else "",
        said=said(job),
    )


def said(job: store.Job) -> Markup:
    """What a job says of itself in words."""
    place = {None: "", 1: "Next in the queue."}.get(job.position, f"Place {job.position} in the queue.")
    message = place or job.message or ("Starting the worker." if job.active else "")
    return html.note(message, "bad" if job.state in ("failed", "interrupted") else "plain") if message else Markup()

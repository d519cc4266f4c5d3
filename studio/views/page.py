"""The one page: its tabs, what they share, and the links that lead into it."""

from __future__ import annotations

from collections.abc import Callable
from time import time_ns
from typing import Any, NamedTuple

import gradio as gr

from ..gate import Uploads
from ..users import Users
from ..workspace import Workspace
from .bind import Binder, Desk, Handler

TABS = {
    "train": "Train",
    "runs": "Runs",
    "library": "Library",
    "blend": "Blend",
    "compare": "Compare",
    "system": "System",
}


class Opening(NamedTuple):
    """What a tab does when it is turned to."""

    handler: Handler
    inputs: list[Any]
    outputs: list[Any]


class Page(Binder):
    """What the tabs share while they are built."""

    job: gr.Textbox
    """Id of the run that Runs shows; hidden, and not a State, so that the address can follow it."""
    adapter: gr.Textbox
    """Id of the adapter that Library shows."""
    turn: gr.Textbox
    """Takes what `to` says: the tab to turn to."""

    def __init__(self, ws: Workspace, uploads: Uploads, users: Users | None):
        super().__init__(ws, uploads, users)
        self._openings: dict[str, list[Opening]] = {key: [] for key in TABS}

    def on_open(self, tab: str, handler: Handler, inputs: list[Any], outputs: list[Any]) -> None:
        """Call `handler` whenever a tab is turned to, together with the others of the tab, in one request."""
        self._openings[tab].append(Opening(handler, inputs, outputs))

    def opened(self, tab: str, event: Callable[..., Any]) -> None:
        """Bind what `on_open` has collected for a tab."""
        parts = self._openings[tab]

        def open_tab(desk: Desk, *values: Any) -> list[Any]:
            rest, made = list(values), []
            for part in parts:
                own, rest = rest[: len(part.inputs)], rest[len(part.inputs) :]
                found = part.handler(desk, *own)
                made += found if len(part.outputs) > 1 else [found]
            return made

        self.on(
            event, open_tab, [i for part in parts for i in part.inputs], [o for part in parts for o in part.outputs]
        )


def to(tab: str, asked_in: str) -> str:
    """What `Page.turn` takes: turn to `tab`, if the page still shows the one where it was asked for."""
    return f"{asked_in} {tab} {time_ns()}"


def build(page: Page) -> gr.Blocks:
    """Gradio's blocks of the whole studio."""
    from . import blend, compare, library, runs, system, train

    views = {"train": train, "runs": runs, "library": library, "blend": blend, "compare": compare, "system": system}
    with gr.Blocks(title="Veneer Studio", analytics_enabled=False, fill_width=True) as blocks:
        _head(page)
        page.job = gr.Textbox("", label="Run", visible="hidden", elem_id="page-job")
        page.adapter = gr.Textbox("", label="Adapter", visible="hidden", elem_id="page-adapter")
        page.turn = gr.Textbox("", label="Turn to", visible="hidden", elem_id="page-turn")
        with gr.Tabs(elem_id="tabs", selected="train", overflow_behavior="wrap"):
            for key, label in TABS.items():
                with gr.Tab(label, id=key, elem_id=f"tab-{key}") as tab:
                    page.on(tab.select, None, js=_REMEMBER % key)
                    views[key].build(page)
                page.opened(key, tab.select)
        followed = page.on(blocks.load, None, None, [page.job, page.adapter], js=_FOLLOW)
        page.on(followed.then, None, js=_OPEN)
        page.on(blocks.load, None, js=_STAY)
        page.on(page.turn.change, None, page.turn, js=_TURN)
        page.on(page.job.change, None, page.job, js=_LINK % ("job", "job"))
        page.on(page.adapter.change, None, page.adapter, js=_LINK % ("adapter", "adapter"))
        from .. import api

        api.add(page)
    return blocks


_FOLLOW = """() => {
  document.documentElement.lang = 'en';
  const asked = new URL(location).searchParams;
  return [asked.get('job') || '', asked.get('adapter') || ''];
}"""
_OPEN = """() => {
  const asked = document.getElementById(`tab-${new URL(location).searchParams.get('tab')}-button`);
  if (asked && !window.veneerReady) asked.click();
  window.veneerReady = true;
}"""
"""Links are followed in the browser: an answer of the server that comes late would turn away from a tab that somebody
has chosen meanwhile."""
_STAY = """() => {
  let first = null;
  const look = async () => {
    if (document.visibilityState !== 'visible') return;
    const now = await fetch('/health').then(answer => answer.json()).then(told => told.started).catch(() => null);
    document.body.classList.toggle('alone', now === null);
    if (first !== null && now !== null && now !== first) location.reload();
    first = first || now;
  };
  look();
  setInterval(look, 3000);
  document.addEventListener('visibilitychange', look);
}"""
"""A server that was restarted knows nothing of open pages: they load themselves anew, and their drafts with them."""
_TURN = """(turn) => {
  const [from, to] = turn.split(' ').map(key => document.getElementById(`tab-${key}-button`));
  if (from && to && from.getAttribute('aria-selected') === 'true') to.click();
}"""
_REMEMBER = """() => {
  if (!window.veneerReady) return;
  const u = new URL(location); u.searchParams.set('tab', '%s'); history.replaceState(null, '', u);
}"""
_LINK = """(id) => {
  if (!window.veneerReady) return;
  const u = new URL(location);
  if (id) u.searchParams.set('%s', id); else u.searchParams.delete('%s');
  history.replaceState(null, '', u);
}"""


def _head(page: Page) -> None:
    leave = '<form method="post" action="/logout"><button class="act" type="submit">Log out</button></form>'
    gr.HTML(
        '<header class="top"><h1>Veneer <span>Studio</span></h1>' + (leave if page.users else "") + "</header>",
        js_on_load=None,
    )


def saved(desk: Desk, form: str, names: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, Any]:
    """Keep what a form holds as its draft, and give it by name."""
    from ..services import drafts

    held = dict(zip(names, values, strict=True))
    drafts.save(desk.ws, desk.user, form, held)
    return held

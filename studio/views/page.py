"""The one page: its tabs, what they share, and the links that lead into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ..gate import Uploads
from ..workspace import Workspace
from .bind import Binder, Desk

TABS = {
    "train": "Train",
    "runs": "Runs",
    "library": "Library",
    "blend": "Blend",
    "compare": "Compare",
    "system": "System",
}


class Page(Binder):
    """What the tabs share while they are built."""

    tabs: gr.Tabs
    job: gr.Textbox
    """Id of the run that Runs shows; hidden, and not a State, so that the address can follow it."""
    adapter: gr.Textbox
    """Id of the adapter that Library shows."""

    def __init__(self, ws: Workspace, uploads: Uploads, many: bool):
        super().__init__(ws, uploads)
        self.many = many
        self.openings: list[Callable[[Any], None]] = []
        self._tabs: dict[str, gr.Tab] = {}

    def on_open(self, tab: str, handler: Callable[..., Any], inputs: Any, outputs: Any) -> None:
        """Call `handler` when the page opens and whenever its tab is turned to."""
        self.openings.append(lambda blocks: self.on(blocks.load, handler, inputs, outputs))
        self.on(self._tabs[tab].select, handler, inputs, outputs)

    def go(self, tab: str) -> gr.Tabs:
        """An update that turns to a tab."""
        return gr.Tabs(selected=tab)


def build(page: Page) -> gr.Blocks:
    """Gradio's blocks of the whole studio."""
    from . import blend, compare, library, runs, system, train

    views = {"train": train, "runs": runs, "library": library, "blend": blend, "compare": compare, "system": system}
    with gr.Blocks(title="Veneer Studio", analytics_enabled=False, fill_width=True) as blocks:
        _head(page)
        page.job = gr.Textbox("", label="Run", visible="hidden", elem_id="page-job")
        page.adapter = gr.Textbox("", label="Adapter", visible="hidden", elem_id="page-adapter")
        with gr.Tabs(elem_id="tabs", selected="train", overflow_behavior="wrap") as page.tabs:
            for key, label in TABS.items():
                with gr.Tab(label, id=key, elem_id=f"tab-{key}") as tab:
                    page._tabs[key] = tab
                    page.on(tab.select, None, js=_REMEMBER % key)
                    views[key].build(page)
        for opening in page.openings:
            opening(blocks)
        page.on(blocks.load, None, js=_LABELS)
        blocks.load(
            _follow_link,
            None,
            [page.tabs, page.job, page.adapter],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        ).then(None, js="() => { window.veneerReady = true; }")
        page.on(page.job.change, None, page.job, js=_LINK % "job")
        page.on(page.adapter.change, None, page.adapter, js=_LINK % "adapter")
        from .. import api

        api.add(page)
    return blocks


_REMEMBER = (
    "() => { if (!window.veneerReady) return; const u = new URL(location); u.searchParams.set('tab', '%s');"
    " history.replaceState(null, '', u); }"
)
_LINK = (
    "(id) => { if (!window.veneerReady) return; const u = new URL(location); if (id) u.searchParams.set('%s', id);"
    " history.replaceState(null, '', u); }"
)
_LABELS = "() => { document.documentElement.lang = 'en'; }"


def _follow_link(request: gr.Request) -> tuple[Any, Any, Any]:
    asked = request.query_params
    tab = asked.get("tab", "")
    return gr.Tabs(selected=tab) if tab in TABS else gr.skip(), asked.get("job", ""), asked.get("adapter", "")


def _head(page: Page) -> None:
    leave = '<form method="post" action="/logout"><button class="act" type="submit">Log out</button></form>'
    gr.HTML(
        '<header class="top"><h1>Veneer <span>Studio</span></h1>' + (leave if page.many else "") + "</header>",
        js_on_load=None,
    )


def saved(desk: Desk, form: str, names: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, Any]:
    """Keep what a form holds as its draft, and give it by name."""
    from ..services import drafts

    held = dict(zip(names, values, strict=True))
    drafts.save(desk.ws, desk.user, form, held)
    return held

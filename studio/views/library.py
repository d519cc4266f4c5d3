"""Library: the user's adapters as cards, one of them in detail, import, export, trash."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import files
from ..jobs.store import Job
from ..services import export, library, trash
from . import blend, compare, html
from .bind import Desk
from .html import html as h
from .page import Page, to
from .watch import Watch


def build(page: Page) -> None:
    with gr.Row():
        query = gr.Textbox(
            "", label="Search", placeholder="name, trigger, tag …", elem_id="library-search", interactive=True
        )
        base = gr.Dropdown([("all", "")], value="", label="Base model", elem_id="library-base", interactive=True)
        method = gr.Dropdown([("all", "")], value="", label="Method", elem_id="library-method", interactive=True)
        tag = gr.Dropdown([("all", "")], value="", label="Tag", elem_id="library-tag", interactive=True)
    cards = gr.HTML(elem_id="library-cards", js_on_load=html.CLICKS)
    with gr.Column(visible=False, elem_id="library-one") as one:
        detail = gr.HTML(elem_id="library-detail", js_on_load=html.CLICKS)
        with gr.Row(equal_height=True):
            name = gr.Textbox(label="Name", elem_id="library-name", interactive=True, max_length=80)
            trigger = gr.Textbox(label="Trigger words", elem_id="library-trigger", interactive=True)
            tags = gr.Textbox(label="Tags, by commas", elem_id="library-tags", interactive=True)
            keep = gr.Button("Save card", elem_id="library-save")
        with gr.Row(equal_height=True):
            to_ = gr.Dropdown(
                list(_turned(export.TITLES)), value="kohya", label="Export for", elem_id="library-to", interactive=True
            )
            rank = gr.Number(label="Turn into LoRA of rank (0 keeps the method)", value=0, minimum=0, maximum=1024,
                             precision=0, elem_id="library-rank", interactive=True)  # fmt: skip
            out = gr.Button("Export", elem_id="library-export")
        made = gr.HTML(elem_id="library-export-result")
        exporting = Watch(page, "library", "export", show_export, made)
        with gr.Row():
            delete = gr.Button("Move to trash", variant="stop", elem_id="library-delete")
    with gr.Accordion("Import adapters", open=False, elem_id="library-import"):
        drop = gr.File(
            label="Safetensors of any dialect, or PEFT's two files, or a zip of them; up to 20 MB each",
            file_count="multiple",
            elem_id="library-files",
            interactive=True,
        )
        report = gr.HTML(elem_id="library-report")
        waiting = gr.HTML(elem_id="library-waiting", js_on_load=html.CLICKS)
    with gr.Accordion("Trash", open=False, elem_id="library-trash"):
        trashed = gr.HTML(elem_id="library-bin", js_on_load=html.CLICKS)

    filters = [query, base, method, tag]
    shelf = [cards, trashed]
    chosen_ = [one, detail, name, trigger, tags]
    page.on(query.change, look, [*filters, page.adapter], shelf, trigger_mode="always_last")
    page.on([base.input, method.input, tag.input], look, [*filters, page.adapter], shelf)
    page.on_open("library", look, [*filters, page.adapter], shelf)
    page.on_open("library", choices, [], [base, method, tag, waiting])
    page.on(cards.click, choose, [], [page.adapter], data=True)
    page.on(page.adapter.change, turn_to, [page.adapter, *filters], [*chosen_, *shelf])
    page.on(detail.click, use, [page.adapter], [page.turn], data=True)
    page.on(keep.click, save, [page.adapter, name, trigger, tags, *filters], [detail, *shelf])
    page.on(delete.click, throw_away, [page.adapter], [page.adapter])
    page.on(trashed.click, restore, filters, [page.adapter, *shelf], data=True)
    page.on(drop.upload, bring_in, [drop, *filters], [report, drop, page.adapter, *shelf])
    page.on(waiting.click, bring_waiting, filters, [report, waiting, page.adapter, *shelf], data=True)
    exporting.on(out.click, start_export, [page.adapter, to_, rank])


# ---------------------------------------------------------------- handlers


def look(desk: Desk, *values: str) -> tuple[Markup, Markup]:
    """What passes the filters, and the trash. Values: query, base, method, tag, the chosen adapter."""
    query, base, method, tag, chosen = values
    found = library.list_adapters(desk.ws, desk.user, query or "", base=base, method=method, tag=tag)
    return shelf_of(found, chosen, any(values[:4])), trash_of(desk)


def choices(desk: Desk) -> list[Any]:
    found = library.list_adapters(desk.ws, desk.user)
    kinds = ({a.base for a in found}, {a.method for a in found}, {tag for a in found for tag in a.tags})
    filled = [gr.Dropdown(choices=[("all", ""), *sorted((k, k) for k in kind if k)]) for kind in kinds]
    return [*filled, waiting_of(desk)]


def choose(desk: Desk, data: dict[str, Any]) -> str:
    return library.get(desk.ws, desk.user, data.get("adapter")).id


def show(desk: Desk, adapter: str) -> Any:
    if not adapter:
        return gr.Column(visible=False), "", "", "", ""
    found = library.get(desk.ws, desk.user, adapter)
    card = card_of(found, library.report(desk.ws, desk.user, adapter))
    return gr.Column(visible=True), card, found.name, found.trigger, ", ".join(found.tags)


def turn_to(desk: Desk, adapter: str, *filters: str) -> Any:
    return *show(desk, adapter), *look(desk, *filters, adapter)


def use(desk: Desk, data: dict[str, Any], adapter: str) -> str:
    """Go on to Blend or Compare with this adapter."""
    tab = str(data.get("act"))
    _USES[tab](desk, adapter)
    return to(tab, "library")


_USES = {"blend": blend.offer, "compare": compare.offer}


def save(desk: Desk, adapter: str, name: str, trigger: str, tags: str, *filters: str) -> Any:
    library.rename(desk.ws, desk.user, adapter, name)
    library.set_trigger(desk.ws, desk.user, adapter, trigger)
    library.set_tags(desk.ws, desk.user, adapter, [tag for tag in tags.split(",") if tag.strip()])
    gr.Info("The card is saved.")
    return show(desk, adapter)[1], *look(desk, *filters, adapter)


def throw_away(desk: Desk, adapter: str) -> str:
    library.delete(desk.ws, desk.user, adapter)
    gr.Info("In the trash, at the end of this tab: Restore brings it back.")
    return ""


def restore(desk: Desk, data: dict[str, Any], *filters: str) -> Any:
    adapter = library.restore(desk.ws, desk.user, data.get("adapter")).id
    return adapter, *look(desk, *filters, adapter)


def bring_in(desk: Desk, paths: list[str], *filters: str) -> Any:
    reports = library.import_files(desk.ws, desk.user, desk.own(paths))
    newest = next((report.adapter for report in reports if report.adapter), None)
    return imported(reports), None, newest or gr.skip(), *look(desk, *filters, newest or "")


def bring_waiting(desk: Desk, data: dict[str, Any], *filters: str) -> Any:
    reports = library.import_waiting(desk.ws, desk.user, str(data.get("name")))
    newest = next((report.adapter for report in reports if report.adapter), None)
    return imported(reports), waiting_of(desk), newest or gr.skip(), *look(desk, *filters, newest or "")


def start_export(desk: Desk, adapter: str, to: str, rank: int | None) -> str:
    return export.start(desk.ws, desk.user, adapter, to, rank=int(rank) if rank else None)


def show_export(desk: Desk, job: Job) -> Markup:
    if job.state != "done":
        return Markup()
    path = export.result(desk.ws, desk.user, job.id)
    return html.note(h("Ready: {link} ({size})", link=html.link(files.url("jobs", job.id, path.name), path.name, True),
                       size=html.size(path.stat().st_size)), "good")  # fmt: skip


# ---------------------------------------------------------------- what they show


def shelf_of(adapters: list[library.Adapter], chosen: str, filtered: bool) -> Markup:
    if not adapters:
        hint = "Try fewer words or other filters." if filtered else "Train one, or import a file below."
        return html.empty("No adapter here.", hint)
    return h('<div class="cards">{cards}</div>', cards=html.join(_card(a, a.id == chosen) for a in adapters))


def _card(adapter: library.Adapter, chosen: bool) -> Markup:
    about = " · ".join(filter(None, [adapter.method, adapter.rank and f"rank {adapter.rank}", adapter.base]))
    return h(
        '<button type="button" class="card {chosen}" data-busy data-act="choose" data-adapter="{id}" '
        'aria-pressed="{on}">{picture}<strong>{name}</strong><small>{about}</small><span>{tags}</span></button>',
        chosen="chosen" if chosen else "",
        on="true" if chosen else "false",
        id=adapter.id,
        picture=preview(adapter),
        name=adapter.name,
        about=about,
        tags=html.join(html.badge(tag, "tag") for tag in adapter.tags),
    )


def preview(adapter: library.Adapter) -> Markup:
    if adapter.preview is None:
        return h('<span class="blank">no preview</span>')
    version = int(adapter.preview.stat().st_mtime)
    return html.picture(files.url("adapters", adapter.id, adapter.preview.name, version), f"Preview of {adapter.name}")


def card_of(adapter: library.Adapter, report: dict[str, Any]) -> Markup:
    """Everything that is known of one adapter."""
    known = {
        "Trigger words": h("{t} {c}", t=adapter.trigger, c=html.copy_button(adapter.trigger))
        if adapter.trigger
        else "",
        "Base model": adapter.base,
        "Method": adapter.method,
        "Rank": adapter.rank,
        "From": adapter.source,
        "Added": html.when(adapter.created),
        "Format": report.get("dialect", ""),
        "Size": html.size(report.get("size", 0)),
        "Read whole by": ", ".join(v["program"] for v in report.get("verdicts", []) if v["reads"] == "whole"),
        "Link": html.copy_button(f"/?tab=library&adapter={adapter.id}", "Copy link"),
    }
    partly = [f"{v['program']}: {v['why']}" for v in report.get("verdicts", []) if v["reads"] != "whole"]
    return h(
        '<h3>{name}</h3><div class="line">{blend}{compare}</div>{facts}{partly}{recipe}',
        name=adapter.name,
        blend=html.button("Blend this", "blend"),
        compare=html.button("Compare this", "compare"),
        facts=html.facts(known),
        partly=_folded("Other programs", html.notes(partly, "plain")) if partly else "",
        recipe=_folded("Recipe", h('<pre class="command">{r}</pre>', r=adapter.recipe)) if adapter.recipe else "",
    )


def _folded(title: str, content: Markup) -> Markup:
    return h("<details><summary>{title}</summary>{content}</details>", title=title, content=content)


def imported(reports: list[library.ImportReport]) -> Markup:
    return html.join(html.note(f"{r.name}: {r.message}", "good" if r.adapter else "bad") for r in reports)


def waiting_of(desk: Desk) -> Markup:
    """What lies in the import folder, too large to upload or a folder."""
    names = library.waiting(desk.ws, desk.user)
    hint = h(
        "Larger files and whole folders: put them into <code>{folder}</code> of the studio's data folder.",
        folder=f"import/{desk.user}/",
    )
    rows = (
        h("<li>{name} {take}</li>", name=n, take=html.button("Import", "take", f"Import {n}", name=n)) for n in names
    )
    found = h('<ul class="runs">{rows}</ul>', rows=html.join(rows)) if names else Markup()
    return html.note(hint) + found


def trash_of(desk: Desk) -> Markup:
    ids = trash.thrown_away(desk.ws, desk.user, "adapters")
    rows = (
        h("<li>{name} {back}</li>", name=_name(desk, i), back=html.button("Restore", "restore", adapter=i)) for i in ids
    )
    return h('<ul class="runs">{rows}</ul>', rows=html.join(rows)) if ids else html.empty("The trash is empty.")


def _name(desk: Desk, adapter: str) -> str:
    from ..workspace import read_json

    return (read_json(desk.ws.trash(desk.user, "adapters") / adapter / "card.json") or {}).get("name", adapter)


def _turned(titles: dict[str, str]) -> list[tuple[str, str]]:
    return [(title, key) for key, title in titles.items()]

"""Blend: two to four adapters, a kind that can combine them, a grid of weights to choose from, and Save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import files
from ..errors import StudioError
from ..jobs import store
from ..services import blending, drafts, drawing, models, references
from . import html
from .bind import Desk
from .compare import adapters as available
from .compare import weight
from .html import html as h
from .page import Page, saved
from .watch import Watch

FORM = ("chosen", *(f"weight_{n}" for n in range(1, blending.MOST + 1)), "kind", "options", "prompt", "seed", "model",
        "name")  # fmt: skip
ROWS = (0.4, 0.8, 1.2)
"""Weights of the grid, for each of the first two adapters; two more than these cost too much time on a CPU."""


def build(page: Page) -> None:
    chosen = gr.Dropdown([], label="Adapters (2 to 4)", multiselect=True, max_choices=blending.MOST,
                         elem_id="blend-adapters", interactive=True)  # fmt: skip
    with gr.Row():
        weights = [weight(f"Weight {n}", f"blend-weight-{n}") for n in range(1, blending.MOST + 1)]
    kind, options = gr.State("svd"), gr.State({})
    kinds = gr.HTML(elem_id="blend-kinds", js_on_load=html.CLICKS)
    with gr.Row():
        prompt = gr.Textbox("", label="Prompt of the previews", elem_id="blend-prompt", interactive=True, scale=4,
                            max_length=1000)  # fmt: skip
        seed = gr.Number(0, label="Seed", minimum=0, precision=0, elem_id="blend-seed", interactive=True, scale=1)
        model = gr.Dropdown(["embedded"], value="embedded", label="Base model", elem_id="blend-model",
                            interactive=True, scale=2)  # fmt: skip
    grid = gr.Button("Draw a grid of weights", elem_id="blend-grid")
    table = gr.HTML(elem_id="blend-table", js_on_load=html.CLICKS)
    drawing_ = Watch(page, "blend", "grid", show_grid, table)
    with gr.Row(equal_height=True):
        name = gr.Textbox("", label="Name of the blend", elem_id="blend-name", interactive=True, scale=3, max_length=80)
        save = gr.Button("Save to the library", variant="primary", elem_id="blend-save", scale=1)
    made = gr.HTML(elem_id="blend-made", js_on_load=html.CLICKS)
    saving = Watch(page, "blend", "blend", show_saved, made)

    held = [chosen, *weights, kind, options, prompt, seed, model, name]
    picked = [chosen, kind, options]
    page.on_open("blend", open_, None, [*held, kinds])
    page.on(chosen.change, choose, [*picked, prompt], [kinds, prompt, *weights])
    page.on(kinds.input, set_, picked, [kind, options], data=True, trigger_mode="multiple", concurrency_limit=1)
    page.on(kind.change, show_kinds, picked, [kinds])
    page.on([part.change for part in held], keep, held, [], trigger_mode="always_last")
    drawing_.on(grid.click, begin_grid, held)
    page.on(table.click, adopt, [chosen], weights, data=True)
    saving.on(save.click, begin_save, held)
    page.on(made.click, open_saved, None, [page.adapter, page.tabs], data=True)


# ---------------------------------------------------------------- handlers


def open_(desk: Desk) -> Any:
    choices = available(desk)
    weights = {name: 1.0 for name in FORM if name.startswith("weight")}
    form: dict[str, Any] = weights | {
        "chosen": [], "kind": "svd", "options": {}, "prompt": "", "seed": 0, "model": "embedded", "name": "",
    } | drafts.load(desk.ws, desk.user, "blend")  # fmt: skip
    form["chosen"] = [reference for reference in form["chosen"] if reference in [key for _, key in choices]]
    names = [model.name for model in models.list_models(desk.ws)]
    table = show_kinds(desk, form["chosen"], form["kind"], form["options"])
    form["model"] = gr.Dropdown(choices=names, value=form["model"] if form["model"] in names else names[0])
    form["chosen"] = gr.Dropdown(choices=choices, value=form["chosen"])
    return *(form[name] for name in FORM), table


def choose(desk: Desk, chosen: list[str], kind: str, options: Mapping[str, Any], prompt: str) -> Any:
    found = [references.find(desk.ws, desk.user, reference) for reference in chosen]
    words = _together(adapter.trigger for adapter in found)
    typed = prompt not in ("", *(_together(a.trigger for a in found[:n]) for n in range(len(found))))
    labels = [adapter.name for adapter in found] + [""] * blending.MOST
    sliders = [gr.Slider(label=f"Weight of {labels[n]}", visible=bool(labels[n])) for n in range(blending.MOST)]
    return show_kinds(desk, chosen, kind, options), gr.skip() if typed else words, *sliders


def _together(triggers: Iterable[str]) -> str:
    return ", ".join(trigger for trigger in triggers if trigger)


def show_kinds(desk: Desk, chosen: list[str], kind: str, options: Mapping[str, Any]) -> Markup:
    return kinds_of(blending.kinds(desk.ws, desk.user, chosen), kind, options)


def set_(desk: Desk, data: Mapping[str, Any], chosen: list[str], kind: str, options: Mapping[str, Any]) -> Any:
    if data.get("field") == "kind":
        return str(data.get("value")), {}
    return kind, {**options, str(data.get("field")): number(data.get("value"))}


def keep(desk: Desk, *values: Any) -> None:
    saved(desk, "blend", FORM, values)


def begin_grid(desk: Desk, *values: Any) -> str:
    form, weighted = _asked(desk, values)
    return blending.preview_grid(desk.ws, desk.user, weighted, form["kind"], form["prompt"], ROWS, ROWS,
                                 [form["seed"]], form["model"], form["options"], steps=12)  # fmt: skip


def adopt(desk: Desk, data: Mapping[str, Any], chosen: list[str]) -> Any:
    weights = [float(text) for text in str(data.get("weights", "")).split()]
    if len(weights) != len(chosen):
        raise StudioError("This grid is of other adapters. Draw a new one.")
    gr.Info("The weights are adopted.")
    return [*weights, *[gr.skip()] * (blending.MOST - len(weights))]


def begin_save(desk: Desk, *values: Any) -> str:
    form, weighted = _asked(desk, values)
    return blending.save_blend(desk.ws, desk.user, form["name"], weighted, form["kind"], form["model"],
                               form["options"], form["prompt"], form["seed"])  # fmt: skip


def open_saved(desk: Desk, data: Mapping[str, Any]) -> Any:
    return str(data.get("adapter", "")), gr.Tabs(selected="library")


def _asked(desk: Desk, values: Sequence[Any]) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    form = saved(desk, "blend", FORM, tuple(values))
    return form, [(reference, form[f"weight_{n}"]) for n, reference in enumerate(form["chosen"], 1)]


def number(text: Any) -> Any:
    """What a form's input holds: a number where it is one."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


# ---------------------------------------------------------------- what they show


def kinds_of(known: Sequence[blending.Kind], chosen: str, options: Mapping[str, Any]) -> Markup:
    """Every kind, the impossible ones greyed with their reason; then the options of the chosen one."""
    reads = next((kind.options for kind in known if kind.name == chosen), ())
    fields = [blending.OPTIONS[name] for name in reads]
    return h(
        '<fieldset class="kinds"><legend>How they become one</legend>{kinds}</fieldset>'
        '<div class="fields">{fields}</div>',
        kinds=html.join(_kind(kind, kind.name == chosen) for kind in known),
        fields=html.join(html.field(field, options.get(field.name, field.default)) for field in fields),
    )


def _kind(kind: blending.Kind, on: bool) -> Markup:
    return h(
        '<label class="{css}"><input type="radio" name="blend-kind" data-field="kind" value="{name}"{on}{off}>'
        "<b>{title}</b><small>{text}</small></label>",
        css="off" if kind.reason else "",
        name=kind.name,
        on=Markup(" checked") if on else "",
        off=Markup(" disabled") if kind.reason else "",
        title=kind.title,
        text=f"Not possible: it {kind.reason}"
        if kind.reason and "choose" not in kind.reason
        else kind.reason or kind.help,
    )


def show_grid(desk: Desk, job: store.Job) -> Markup:
    """Baselines above; below, the blend at the weights of the first adapter by those of the second."""
    cells = drawing.pictures(desk.ws, desk.user, job.id)
    base = [cell for cell in cells if cell.row < 0]
    rows = [[cell for cell in cells if cell.row == row] for row in range(1 + max(cell.row for cell in cells))]
    names = [adapter["name"] for adapter in job.arguments["adapters"]]
    heads = [f"{names[1]} at {cell.weights[1]:g}" for cell in rows[0]]
    body = [(f"{names[0]} at {row[0].weights[0]:g}", [_cell(job, cell) for cell in row]) for row in rows]
    alone = html.table("", [cell.label for cell in base], [("without blending", [_cell(job, c, False) for c in base])],
                       "Baselines")  # fmt: skip
    hint = html.note("Click a picture to adopt its weights.")
    return alone + hint + html.table("", heads, body, "The blend at many weights")


def _cell(job: store.Job, cell: drawing.Cell, adoptable: bool = True) -> Markup:
    if cell.picture is None:
        return h('<span class="pending">…</span>')
    image = html.picture(files.url("jobs", job.id, cell.picture.name), f"{cell.label}: {cell.prompt}")
    if not adoptable:
        return image
    return h(
        '<button type="button" class="cell" data-busy data-act="adopt" data-weights="{weights}" '
        'aria-label="Adopt the weights {label}">{image}</button>',
        weights=" ".join(f"{weight:g}" for weight in cell.weights),
        label=cell.label,
        image=image,
    )


def show_saved(desk: Desk, job: store.Job) -> Markup:
    adapter = blending.saved(desk.ws, desk.user, job.id) if job.state == "done" else None
    if adapter is None:
        return Markup()
    show = html.button("Show it", "open", adapter=adapter)
    return html.note(h("{name} is in the library. {show}", name=job.arguments["card"]["name"], show=show), "good")

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
from .page import Page, saved, to
from .watch import Watch

AXES = ("rows_of", "rows", "columns_of", "columns")
FORM = ("chosen", *(f"weight_{n}" for n in range(1, blending.MOST + 1)), "kind", "options", "prompt", "seed", "model",
        "name", *AXES)  # fmt: skip
USUAL: dict[str, Any] = {
    "chosen": [], **{name: 1.0 for name in FORM if name.startswith("weight")}, "kind": "svd", "options": {},
    "prompt": "", "seed": 0, "model": "embedded", "name": "",
    "rows_of": "weight-1", "rows": "0.4, 0.8, 1.2", "columns_of": "weight-2", "columns": "0.4, 0.8, 1.2",
}  # fmt: skip


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
    with gr.Row():
        axes = [part for name in ("rows", "columns") for part in _axis(name)]
    grid = gr.Button("Draw the grid", elem_id="blend-grid")
    table = gr.HTML(elem_id="blend-table", js_on_load=html.CLICKS)
    drawing_ = Watch(page, "blend", "grid", show_grid, table)
    with gr.Row(equal_height=True):
        name = gr.Textbox("", label="Name of the blend", elem_id="blend-name", interactive=True, scale=3, max_length=80)
        save = gr.Button("Save to the library", variant="primary", elem_id="blend-save", scale=1)
    made = gr.HTML(elem_id="blend-made", js_on_load=html.CLICKS)
    saving = Watch(page, "blend", "blend", show_saved, made)

    held = [chosen, *weights, kind, options, prompt, seed, model, name, *axes]
    named = [kinds, prompt, axes[0], axes[2], *weights]
    page.on_open("blend", open_, [], [*held, kinds])
    picked = page.on(chosen.input, choose, held, named)
    filled = page.on(kinds.input, set_, [chosen, kind, options], [kind, options, kinds], data=True,
                     trigger_mode="multiple", concurrency_limit=1)  # fmt: skip
    adopted = page.on(table.click, adopt, [chosen], [*weights, seed], data=True)
    typed = [part.change for part in (*weights, prompt, seed, model, name, *axes)]
    page.on([*typed, picked.success, filled.success, adopted.success], keep, held, [], trigger_mode="always_last")
    drawing_.on(grid.click, begin_grid, held)
    saving.on(save.click, begin_save, held)
    page.on(made.click, open_saved, None, [page.adapter, page.turn], data=True)


def _axis(name: str) -> tuple[gr.Dropdown, gr.Textbox]:
    of = gr.Dropdown(_axes([]), value=USUAL[f"{name}_of"], label=f"{name.capitalize()} of the grid: what changes",
                     elem_id=f"blend-{name}-of", interactive=True)  # fmt: skip
    return of, gr.Textbox(USUAL[name], label=f"{name.capitalize()}: its values", elem_id=f"blend-{name}",
                          interactive=True, max_length=200)  # fmt: skip


# ---------------------------------------------------------------- handlers


def open_(desk: Desk) -> list[Any]:
    choices = available(desk)
    form = USUAL | drafts.load(desk.ws, desk.user, "blend")
    form["chosen"] = [reference for reference in form["chosen"] if reference in [key for _, key in choices]]
    names = [model.name for model in models.list_models(desk.ws)]
    kinds, prompt, rows_of, columns_of, *sliders = choose(desk, *(form[name] for name in FORM))
    form |= {
        "model": gr.Dropdown(choices=names, value=form["model"] if form["model"] in names else names[0]),
        "chosen": gr.Dropdown(choices=choices, value=form["chosen"]),
        "prompt": prompt,
        "rows_of": rows_of,
        "columns_of": columns_of,
        **{f"weight_{n}": slider for n, slider in enumerate(sliders, 1)},
    }
    return [*(form[name] for name in FORM), kinds]


def choose(desk: Desk, *values: Any) -> list[Any]:
    """What depends on the chosen adapters: how they can be blended, the prompt, and what is named after them."""
    form = dict(zip(FORM, values, strict=True))
    found = [references.find(desk.ws, desk.user, reference) for reference in form["chosen"]]
    suggested = ("", *(_together(a.trigger for a in found[:n]) for n in range(len(found))))
    names = [adapter.name for adapter in found]
    return [
        kinds_of(blending.kinds(desk.ws, desk.user, form["chosen"]), form["kind"], form["options"]),
        _together(a.trigger for a in found) if form["prompt"] in suggested else form["prompt"],
        *(gr.Dropdown(choices=_axes(names), value=form[of]) for of in ("rows_of", "columns_of")),
        *(_slider(names, n, form[f"weight_{n}"]) for n in range(1, blending.MOST + 1)),
    ]


def _slider(names: Sequence[str], n: int, value: float) -> gr.Slider:
    shown = n <= len(names)
    return gr.Slider(value=value, label=f"Weight of {names[n - 1]}" if shown else f"Weight {n}", visible=shown)


def _axes(names: Sequence[str]) -> list[tuple[str, str]]:
    """What may change along a grid, for a dropdown; two adapters before any is chosen."""
    shown = [f"Weight of {name}" for name in names] + [f"Weight {n}" for n in range(len(names) + 1, 3)]
    weights = [(text, f"weight-{n}") for n, text in enumerate(shown, 1)]
    return [*weights, ("Strength of the blend", "strength"), ("Seed", "seed")]


def _together(triggers: Iterable[str]) -> str:
    return ", ".join(trigger for trigger in triggers if trigger)


def set_(desk: Desk, data: Mapping[str, Any], chosen: list[str], kind: str, options: Mapping[str, Any]) -> Any:
    if data.get("field") == "kind":
        kind = str(data.get("value"))
        return kind, {}, kinds_of(blending.kinds(desk.ws, desk.user, chosen), kind, {})
    return kind, {**options, str(data.get("field")): number(data.get("value"))}, gr.skip()


def keep(desk: Desk, *values: Any) -> None:
    saved(desk, "blend", FORM, values)


def offer(desk: Desk, adapter: str) -> None:
    """Put an adapter among the chosen ones, for whoever opens the tab next."""
    form = USUAL | drafts.load(desk.ws, desk.user, "blend")
    if adapter in form["chosen"]:
        return
    if len(form["chosen"]) >= blending.MOST:
        raise StudioError(f"Blend holds {blending.MOST} adapters already. Take one out there first.")
    drafts.save(desk.ws, desk.user, "blend", form | {"chosen": [*form["chosen"], adapter]})


def begin_grid(desk: Desk, *values: Any) -> str:
    form, weighted = _asked(desk, values)
    rows, columns = ((form[f"{name}_of"], numbers(form[name])) for name in ("rows", "columns"))
    return blending.preview_grid(desk.ws, desk.user, weighted, form["kind"], form["prompt"], rows, columns,
                                 form["seed"], form["model"], form["options"], steps=12)  # fmt: skip


def adopt(desk: Desk, data: Mapping[str, Any], chosen: list[str]) -> Any:
    weights = [float(text) for text in str(data.get("weights", "")).split()]
    if len(weights) != len(chosen):
        raise StudioError("This grid is of other adapters. Draw a new one.")
    gr.Info("The weights are adopted.")
    return [*weights, *[gr.skip()] * (blending.MOST - len(weights)), int(data["seed"])]


def begin_save(desk: Desk, *values: Any) -> str:
    form, weighted = _asked(desk, values)
    return blending.save_blend(desk.ws, desk.user, form["name"], weighted, form["kind"], form["model"],
                               form["options"], form["prompt"], form["seed"])  # fmt: skip


def open_saved(desk: Desk, data: Mapping[str, Any]) -> Any:
    return str(data.get("adapter", "")), to("library", "blend")


def _asked(desk: Desk, values: Sequence[Any]) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    form = saved(desk, "blend", FORM, tuple(values))
    return form, [(reference, form[f"weight_{n}"]) for n, reference in enumerate(form["chosen"], 1)]


def numbers(text: str) -> list[int | float]:
    """Numbers as somebody types them, with commas or blanks between."""
    try:
        found = [float(word) for word in str(text).replace(",", " ").replace(";", " ").split()]
    except ValueError:
        raise StudioError(f"{text[:80]!r} is no list of numbers: type them as in 0.4, 0.8, 1.2.") from None
    return [int(value) if value.is_integer() else value for value in found]


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
    same = {kind.reason for kind in known}
    waiting = same.pop() if len(same) == 1 else ""  # the same reason against all is said once
    return h(
        '<fieldset class="kinds"><legend>How they become one</legend>{waiting}{kinds}</fieldset>'
        '<div class="fields">{fields}</div>',
        waiting=html.note(f"{waiting.capitalize()} first.") if waiting else "",
        kinds=html.join(_kind(kind, kind.name == chosen, not waiting) for kind in known),
        fields=html.join(html.field(field, options.get(field.name, field.default)) for field in fields),
    )


def _kind(kind: blending.Kind, on: bool, tell: bool) -> Markup:
    return h(
        '<label class="{css}"><input type="radio" name="blend-kind" data-field="kind" value="{name}"{on}{off}>'
        "<b>{title}</b><small>{text}</small></label>",
        css="off" if kind.reason and tell else "",
        name=kind.name,
        on=Markup(" checked") if on else "",
        off=Markup(" disabled") if kind.reason else "",
        title=kind.title,
        text=f"Not possible: it {kind.reason}" if kind.reason and tell else kind.help,
    )


def show_grid(desk: Desk, job: store.Job) -> Markup:
    """Baselines above; below, the blend at one thing by another."""
    cells = drawing.pictures(desk.ws, desk.user, job.id)
    base = [cell for cell in cells if cell.row < 0]
    rows = [[cell for cell in cells if cell.row == row] for row in range(1 + max(cell.row for cell in cells))]
    names = [adapter["name"] for adapter in job.arguments["adapters"]]
    places, heads = (_places(job.arguments["axes"][name], names) for name in ("rows", "columns"))
    body = [(place, [_cell(job, cell) for cell in row]) for place, row in zip(places, rows, strict=True)]
    alone = html.table("", [cell.label for cell in base], [("without blending", [_cell(job, c, False) for c in base])],
                       "Baselines")  # fmt: skip
    hint = html.note("Click a picture to adopt its weights.")
    return alone + hint + html.table("", heads, body, "The blend at many weights")


def _places(axis: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The heads of a grid's rows or columns."""
    of = axis["of"]
    what = f"{names[int(of[-1]) - 1]} at" if of.startswith("weight-") else of
    return [f"{what} {value:g}" for value in axis["values"]]


def _cell(job: store.Job, cell: drawing.Cell, adoptable: bool = True) -> Markup:
    if cell.picture is None:
        return h('<span class="pending">…</span>')
    image = html.picture(files.url("jobs", job.id, cell.picture.name), f"{cell.label}: {cell.prompt}")
    if not adoptable:
        return image
    return h(
        '<button type="button" class="cell" data-busy data-act="adopt" data-weights="{weights}" data-seed="{seed}" '
        'aria-label="Adopt the weights {label}">{image}</button>',
        weights=" ".join(f"{weight:g}" for weight in cell.weights),
        seed=cell.seed,
        label=cell.label,
        image=image,
    )


def show_saved(desk: Desk, job: store.Job) -> Markup:
    adapter = blending.saved(desk.ws, desk.user, job.id) if job.state == "done" else None
    if adapter is None:
        return Markup()
    show = html.button("Show it", "open", adapter=adapter)
    return html.note(h("{name} is in the library. {show}", name=job.arguments["card"]["name"], show=show), "good")

"""Compare: the same prompt from the same seed, with one adapter and with another or none."""

from __future__ import annotations

from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import files
from ..jobs import store
from ..services import drafts, drawing, library, models, references
from . import html
from .bind import Desk
from .html import html as h
from .page import Page, saved
from .watch import Watch

FORM = ("first", "first_weight", "second", "second_weight", "prompt", "seed", "model", "steps")
USUAL: dict[str, Any] = {"first": "", "first_weight": 1, "second": "", "second_weight": 1, "prompt": "", "seed": 0,
                         "model": "embedded", "steps": 20}  # fmt: skip
NONE = ("the bare model", "")


def build(page: Page) -> None:
    with gr.Row():
        with gr.Column(min_width=260):
            first = gr.Dropdown([NONE], value="", label="Before", elem_id="compare-first", interactive=True)
            first_weight = weight("Weight before", "compare-first-weight")
        with gr.Column(min_width=260):
            second = gr.Dropdown([NONE], value="", label="After", elem_id="compare-second", interactive=True)
            second_weight = weight("Weight after", "compare-second-weight")
    with gr.Row():
        prompt = gr.Textbox("", label="Prompt", placeholder="a photo of sks face", elem_id="compare-prompt",
                            interactive=True, scale=4, max_length=1000)  # fmt: skip
        seed = gr.Number(0, label="Seed", minimum=0, precision=0, elem_id="compare-seed", interactive=True, scale=1)
        steps = gr.Number(20, label="Steps", minimum=1, maximum=200, precision=0, elem_id="compare-steps",
                          interactive=True, scale=1)  # fmt: skip
        model = gr.Dropdown(["embedded"], value="embedded", label="Base model", elem_id="compare-model",
                            interactive=True, scale=2)  # fmt: skip
    start = gr.Button("Draw both", variant="primary", elem_id="compare-start")
    result = gr.HTML(elem_id="compare-result", js_on_load=html.CLICKS)
    watch = Watch(page, "compare", "compare", show, result)

    held = [first, first_weight, second, second_weight, prompt, seed, model, steps]
    page.on_open("compare", open_, [], held)
    suggested = page.on(second.input, suggest, [second, prompt], [prompt])
    typed = [part.change for part in held if part is not second]
    page.on([*typed, suggested.success], keep, held, [], trigger_mode="always_last")
    watch.on([start.click, prompt.submit], begin, held)


def weight(label: str, elem_id: str) -> gr.Slider:
    return gr.Slider(-1, 2, value=1, step=0.05, label=label, elem_id=elem_id, interactive=True, buttons=["reset"])


# ---------------------------------------------------------------- handlers


def open_(desk: Desk) -> list[Any]:
    choices = [NONE, *adapters(desk)]
    form = USUAL | drafts.load(desk.ws, desk.user, "compare")
    sides = {name: gr.Dropdown(choices=choices, value=known(form[name], choices)) for name in ("first", "second")}
    names = [model.name for model in models.list_models(desk.ws)]
    form |= sides | {"model": gr.Dropdown(choices=names, value=form["model"] if form["model"] in names else names[0])}
    return [form[name] for name in FORM]


def keep(desk: Desk, *values: Any) -> None:
    saved(desk, "compare", FORM, values)


def suggest(desk: Desk, second: str, prompt: str) -> Any:
    """The words that call the chosen adapter, where no prompt is typed yet."""
    return references.find(desk.ws, desk.user, second).trigger if second and not prompt.strip() else gr.skip()


def offer(desk: Desk, adapter: str) -> None:
    """Put an adapter on the right side, with its prompt, for whoever opens the tab next."""
    prompt = references.find(desk.ws, desk.user, adapter).trigger
    form = USUAL | drafts.load(desk.ws, desk.user, "compare") | {"second": adapter}
    drafts.save(desk.ws, desk.user, "compare", form | ({"prompt": prompt} if prompt else {}))


def begin(desk: Desk, *values: Any) -> str:
    form = saved(desk, "compare", FORM, values)
    sides = [{form[s]: form[f"{s}_weight"]} if form[s] else {} for s in ("first", "second")]
    labels = [name_of(desk, form[s], form[f"{s}_weight"]) for s in ("first", "second")]
    return drawing.compare(desk.ws, desk.user, form["prompt"], form["seed"], sides, form["model"], labels,
                           steps=form["steps"])  # fmt: skip


def show(desk: Desk, job: store.Job) -> Markup:
    cells = drawing.pictures(desk.ws, desk.user, job.id)
    if not all(cell.picture for cell in cells) or len(cells) < 2:
        return Markup()
    before, after = (files.url("jobs", job.id, cell.picture.name) for cell in cells[:2] if cell.picture)
    said = h('<p class="note plain">“{prompt}”, seed {seed}</p>', prompt=cells[0].prompt, seed=cells[0].seed)
    slides = html.before_after(before, after, cells[0].label, cells[1].label)
    return h('<div class="slides"><div>{slides}{said}</div></div>', slides=slides, said=said)


# ---------------------------------------------------------------- what can be chosen


def adapters(desk: Desk) -> list[tuple[str, str]]:
    """The library, then what trainings have saved."""
    own = [(adapter.name, adapter.id) for adapter in library.list_adapters(desk.ws, desk.user)]
    trainings = [job for job in store.list_jobs(desk.ws, desk.user) if job.id and job.kind == "train"]
    saved_ = [
        (f"{job.arguments['name']}, step {step}", f"{job.id}:{step}")
        for job in trainings[:10]
        for step in reversed(references.steps(job.out))
    ]
    return own + saved_


def known(value: Any, choices: list[tuple[str, str]]) -> str:
    return value if value in [key for _, key in choices] else ""


def name_of(desk: Desk, reference: str, at: float) -> str:
    return f"{references.find(desk.ws, desk.user, reference).name} at {at:g}" if reference else NONE[0]

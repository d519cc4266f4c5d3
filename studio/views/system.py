"""System: the machine, the base models, and help when something goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import safety
from ..jobs import store
from ..services import models, system
from . import html
from .bind import Desk
from .html import html as h
from .page import Page
from .watch import Watch


def build(page: Page) -> None:
    state = gr.HTML(elem_id="system-state", js_on_load=html.CLICKS)
    known = gr.HTML(elem_id="system-models", js_on_load=html.CLICKS)
    with gr.Row(equal_height=True):
        source = gr.Textbox("", label="Add a base model", elem_id="system-source", interactive=True, scale=3,
                            info="A folder or .safetensors file on this machine, or a hub id.")  # fmt: skip
        name = gr.Textbox("", label="Call it", elem_id="system-name", interactive=True, max_length=60, scale=2,
                          info="Not given, the folder's own name.")  # fmt: skip
        add = gr.Button("Add model", elem_id="system-add", scale=1)
    fetched = gr.HTML(elem_id="system-fetched", js_on_load=None)
    fetching = Watch(page, "system", "fetch", show_fetched, fetched)
    people = gr.HTML(elem_id="system-people", js_on_load=None)
    gr.HTML('<h3>Help</h3><p class="note plain">The diagnostics file holds versions, the states of your jobs and the '
            "worker's log; no pictures and no prompts.</p><p><a class=\"act\" href=\"/files/diagnostics\" download>"
            "Download diagnostics</a></p>", js_on_load=None)  # fmt: skip
    page.on_open("system", look, [], [state, known, people])
    added = fetching.on([add.click, source.submit], add_model, [source, name])
    page.on([added.success, fetched.change], tidy, [source, name], [known, source, name])
    page.on(known.click, remove, None, [known], data=True)


def look(desk: Desk) -> tuple[Markup, Markup, Markup]:
    state = state_of(system.status(desk.ws, desk.user), desk.user)
    return state, models_of(models.list_models(desk.ws)), people_of(system.people(desk.ws, desk.user, desk.users))


def add_model(desk: Desk, source: str, name: str) -> str:
    job = models.begin(desk.ws, desk.user, source, name)
    gr.Info(
        "It is being fetched; this may take a while." if job else "It can be chosen under Train, Blend and Compare."
    )
    return job


def tidy(desk: Desk, source: str, name: str) -> Any:
    """The list of models; what was typed stays until it is on it."""
    known = models.list_models(desk.ws)
    done = any(source.strip() in (model.source, model.name) for model in known)
    return models_of(known), "" if done else source, "" if done else name


def show_fetched(desk: Desk, job: store.Job) -> Markup:
    name = job.arguments["name"]
    done = job.state == "done"
    return html.note(f"{name} can be chosen under Train, Blend and Compare.", "good") if done else Markup()


def remove(desk: Desk, data: Mapping[str, Any]) -> Markup:
    models.remove(desk.ws, desk.user, str(data.get("model")))
    return models_of(models.list_models(desk.ws))


def state_of(now: system.Status, user: str) -> Markup:
    worker = "works or waits for work" if now.worker else "rests; the next job starts it"
    known = {
        "You are": user,
        "Device": {"cpu": "CPU"}.get(now.device, "NVIDIA GPU"),
        "Worker": worker,
        "Jobs": f"{now.running} running, {now.waiting} waiting",
        "Your data": f"{html.size(now.used)} of {html.size(safety.QUOTA)}",
        "Free on disk": html.size(now.free),
        "Versions": ", ".join(f"{name} {number}" for name, number in now.versions.items()),
    }
    low = html.note("The disk is nearly full: trainings may fail. Delete runs or empty the trash.", "warn")
    return h("<h3>This studio</h3>{low}{facts}", low=low if now.free < 2e9 else "", facts=html.facts(known))


def models_of(known: list[models.Model]) -> Markup:
    items = html.join(
        h(
            "<li class='line'><strong>{name}</strong><small>{kind}</small>{remove}</li>",
            name=model.name,
            kind=model.kind if model.kind == "built in" else f"{model.kind}: {model.source}",
            remove=html.button("Remove from the list", "remove", f"Remove {model.name}", model=model.name)
            if model.kind != "built in"
            else "",
        )
        for model in known
    )
    return h("<h3>Base models</h3><ul class='runs'>{items}</ul>", items=items)


def people_of(people: list[system.Person]) -> Markup:
    """Who may log in, and how much of the machine they use."""
    rows = html.join(
        h("<tr><th scope='row'>{name}</th><td>{used}</td><td>{adapters}</td><td>{jobs}</td><td>{seen}</td></tr>",
          name=p.name, used=html.size(p.used), adapters=p.adapters, jobs=p.active,
          seen=html.when(p.last) if p.last else "never")
        for p in people
    )  # fmt: skip
    if not people:
        return Markup()
    heads = html.join(h("<th scope='col'>{head}</th>", head=head) for head in _PEOPLE)
    return h(
        "<h3>People</h3><div class='scroll'><table class='people'><thead><tr>{heads}</tr></thead>"
        "<tbody>{rows}</tbody></table></div>",
        heads=heads,
        rows=rows,
    )


_PEOPLE = ("Name", "Data", "Adapters", "Jobs now", "Last job")

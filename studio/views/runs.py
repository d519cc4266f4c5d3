"""Runs: the queue and what has been, and one training in detail while it learns."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import files
from ..errors import NotFound
from ..jobs import store
from ..services import drafts, runs
from . import html
from .bind import Desk
from .html import html as h
from .page import Page, to
from .watch import EVERY, said

TITLES = {"train": "Training", "draw": "Pictures", "grid": "Grid", "blend": "Blend", "compare": "Comparison",
          "convert": "Export", "fetch": "Base model"}  # fmt: skip


def build(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            listed = gr.HTML(elem_id="runs-list", js_on_load=html.CLICKS)
        with gr.Column(scale=5, min_width=320):
            head = gr.HTML(elem_id="runs-detail", js_on_load=html.CLICKS)
            with gr.Column(visible=False, elem_id="runs-training") as training:
                samples = gr.HTML(elem_id="runs-samples")
                with gr.Row():
                    chart = gr.LinePlot(x="step", y="loss", color="line", x_title="step", y_title="loss", title="Loss",
                                        color_map={"each step": "#94a3b8", "smoothed": "#0d9488"}, buttons=[],
                                        elem_id="runs-chart", show_label=False, visible=False)  # fmt: skip
                log_scale = gr.Checkbox(False, label="Logarithmic loss", elem_id="runs-log-scale", interactive=True)
                with gr.Row(equal_height=True):
                    step = gr.Dropdown([], label="Keep", elem_id="runs-step", interactive=True)
                    name = gr.Textbox(
                        "", label="Name in the library", elem_id="runs-name", interactive=True, max_length=80
                    )
                    keep = gr.Button("Add to library", variant="primary", elem_id="runs-keep")
            with gr.Accordion("Log", open=False, elem_id="runs-log-fold", visible=False) as fold:
                log = gr.HTML(elem_id="runs-log", js_on_load=None)
    timer, seen = gr.Timer(EVERY, active=False), gr.State({})

    shown = [page.job, listed, head, training, samples, chart, step, fold, log, timer, seen]
    fresh = gr.State({})
    page.on_open("runs", look, [page.job, log_scale, fresh], shown)
    page.on(log_scale.input, look, [page.job, log_scale, fresh], shown)
    page.on(timer.tick, look, [page.job, log_scale, seen], shown)
    page.on(listed.click, choose, [log_scale], shown, data=True)
    acted = page.on(head.click, act, [page.job], [page.job, page.turn], data=True)
    page.on(acted.success, look, [page.job, log_scale, fresh], shown)
    page.on(keep.click, add, [page.job, step, name], [page.adapter, page.turn])


# ---------------------------------------------------------------- handlers


def choose(desk: Desk, data: Mapping[str, Any], log_scale: bool) -> Any:
    job = store.owned(desk.ws, desk.user, data.get("job")).id
    return [job, *look(desk, job, log_scale, {})[1:]]


def act(desk: Desk, data: Mapping[str, Any], job: str) -> Any:
    name = data.get("act")
    return _ACTIONS[name](desk, job) if name in _ACTIONS else (gr.skip(), gr.skip())


def add(desk: Desk, job: str, step: int | None, name: str) -> Any:
    adapter = runs.add_to_library(desk.ws, desk.user, job, step or None, name)
    gr.Info("It is in the library.")
    return adapter, to("library", "runs")


def look(desk: Desk, job: str, log_scale: bool, seen: Mapping[str, Any]) -> list[Any]:
    """What has changed since `seen`, and what that is now."""
    jobs = store.list_jobs(desk.ws, desk.user)
    newest = next((found.id for found in jobs if found.id and found.kind == "train"), "")
    chosen, job = gr.skip() if job or not newest else newest, job or newest
    parts = _parts(desk, job, log_scale)
    stamps = {"list": [job, *((j.id, j.state, j.step, j.position) for j in jobs)]} | {
        k: s for k, (s, _) in parts.items()
    }
    shown = {"list": lambda: list_of(jobs, job)} | {key: make for key, (_, make) in parts.items()}
    updates = [shown[key]() if stamps[key] != seen.get(key) else gr.skip() for key in shown]
    return [chosen, *updates, gr.Timer(active=any(found.active for found in jobs)), stamps]


def _parts(desk: Desk, job: str, log_scale: bool) -> dict[str, Any]:
    """The pieces of the detail in the order of their components: for each what it depends on, and how it is made."""
    try:
        found = store.owned(desk.ws, desk.user, job) if job else None
    except NotFound:
        found = None
    if found is None:
        nothing = html.empty("No run chosen.", "Choose one on the left, or start a training.")
        return {"head": (0, lambda: nothing), "training": (0, lambda: gr.Column(visible=False)), **_hidden()}
    text = store.log(desk.ws, desk.user, job)
    fold = {"fold": (bool(text), lambda: gr.Accordion(visible=bool(text))), "log": (text, lambda: _log(text))}
    head = (job, found.state, found.step, found.message, found.position), lambda: head_of(found)
    if found.kind != "train":
        return {"head": head, "training": (0, lambda: gr.Column(visible=False)), **_hidden(), **fold}
    now = runs.progress(desk.ws, desk.user, job)
    return {
        "head": head,
        "training": (1, lambda: gr.Column(visible=True)),
        "samples": ((job, now.sampled, [row.pictures for row in now.samples]), lambda: samples_of(now)),
        "chart": ((job, log_scale, len(now.points), now.points[-1:]), lambda: chart_of(now, log_scale)),
        "step": ((job, now.checkpoints, now.finished), lambda: gr.Dropdown(choices=kept(now), value=kept(now)[0][1])),
        **fold,
    }


def _hidden() -> dict[str, Any]:
    return dict.fromkeys(("samples", "chart", "step", "fold", "log"), (0, gr.skip))


def _asking(flag: Any) -> Any:
    def ask(desk: Desk, job: str) -> Any:
        store.request(desk.ws, desk.user, job, flag)
        gr.Info(_SAID[flag])
        return gr.skip(), gr.skip()

    return ask


_SAID = {
    "stop": "It finishes its step, saves, and stops.",
    "stop_now": "It saves and stops within half a minute, or is ended.",
    "sample_now": "Samples are drawn after this step.",
    "save_now": "A checkpoint is saved after this step.",
}


def _resume(desk: Desk, job: str) -> Any:
    store.resume(desk.ws, desk.user, job)
    gr.Info("Back in the queue; it goes on from its newest checkpoint.")
    return gr.skip(), gr.skip()


def _duplicate(desk: Desk, job: str) -> Any:
    before = store.duplicate(desk.ws, desk.user, job)
    drafts.save(desk.ws, desk.user, "train", before["recipe"] | {"dataset": before["dataset"], "name": before["name"]})
    gr.Info("Its recipe is in the form.")
    return gr.skip(), to("train", "runs")


def _delete(desk: Desk, job: str) -> Any:
    store.delete(desk.ws, desk.user, job)
    return "", gr.skip()


_ACTIONS = {flag: _asking(flag) for flag in _SAID} | {"resume": _resume, "duplicate": _duplicate, "delete": _delete}


# ---------------------------------------------------------------- what they show


def title(job: store.Job) -> str:
    return str(job.arguments.get("name") or job.arguments.get("card", {}).get("name") or TITLES.get(job.kind, job.kind))


def list_of(jobs: list[store.Job], chosen: str) -> Markup:
    if not jobs:
        return html.empty("No runs yet.", "Start a training in the first tab.")
    return h('<ul class="runs" aria-label="Runs">{items}</ul>', items=html.join(_entry(job, chosen) for job in jobs))


def _entry(job: store.Job, chosen: str) -> Markup:
    foreign = not job.id
    place = f" · place {job.position}" if job.position else ""
    return h(
        '<li><button type="button" class="run {on}" data-busy data-act="choose" data-job="{id}" {off}>'
        "<strong>{title}</strong>{badge}<small>{kind} · {when}{place}</small></button></li>",
        on="chosen" if chosen and job.id == chosen else "",
        off=Markup("disabled") if foreign else "",
        id=job.id,
        title="Somebody else's" if foreign else title(job),
        badge=html.badge(job.state),
        kind=TITLES.get(job.kind, job.kind),
        when=html.when(job.created),
        place=place,
    )


def head_of(job: store.Job) -> Markup:
    """Title, state, progress, and the actions that make sense now."""
    trains, runs_now = job.kind == "train", job.state in ("starting", "running")
    offered = {
        "stop": ("Stop and save", job.active and trains),
        "stop_now": ("Stop now", job.active),
        "sample_now": ("Sample now", runs_now and trains),
        "save_now": ("Save now", runs_now and trains),
        "resume": ("Resume", job.resumable),
        "duplicate": ("Duplicate", trains),
        "delete": ("Delete", not job.active),
    }
    buttons = html.join(html.button(label, name) for name, (label, shown) in offered.items() if shown)
    return h(
        '<div class="line"><h3>{title}</h3>{badge}</div>{counted}{bar}{said}<div class="line">{buttons}{link}</div>',
        title=title(job),
        badge=html.badge(job.state),
        counted=h('<p class="note plain">Step {s} of {t}</p>', s=job.step, t=job.total) if job.total and trains else "",
        bar=html.progress(job.step, job.total, "Progress") if job.total else "",
        said=said(job),
        buttons=buttons,
        link=html.copy_button(f"/?tab=runs&job={job.id}", "Copy link"),
    )


def samples_of(now: runs.Progress) -> Markup:
    """Prompts by steps, from before the first step."""
    if not now.sampled:
        return html.empty("No samples yet.", "The first ones show the model as it was before.")
    rows = [
        (
            row.prompt,
            [_sample(now.job, path, row.prompt, step) for step, path in zip(now.sampled, row.pictures, strict=True)],
        )
        for row in now.samples
    ]
    return html.table("", [f"step {step}" for step in now.sampled], rows, "Samples by prompt and step")


def _sample(job: store.Job, path: Any, prompt: str, step: int) -> Markup:
    if path is None:
        return h('<span class="pending">not drawn</span>')
    return html.picture(files.url("jobs", job.id, path.relative_to(job.out).as_posix()), f"{prompt}, step {step}")


def chart_of(now: runs.Progress, log_scale: bool) -> Any:
    import pandas as pd

    shape = (lambda loss: log10(max(loss, 1e-9))) if log_scale else float
    rows = [(point.step, shape(point.loss), "each step") for point in now.points]
    rows += [(point.step, shape(point.smoothed), "smoothed") for point in now.points]
    data = pd.DataFrame(rows, columns=["step", "loss", "line"])
    return gr.LinePlot(value=data, y_title="log10 of the loss" if log_scale else "loss", visible=bool(rows))


def kept(now: runs.Progress) -> list[tuple[str, int]]:
    """What can be added to the library; 0 stands for the newest there is."""
    newest = "the finished adapter" if now.finished else "the newest checkpoint"
    return [(newest, 0), *((f"step {step}", step) for step in reversed(now.checkpoints))]


def _log(text: str) -> Markup:
    return h('<pre class="log" tabindex="0" aria-label="Log">{text}</pre>', text=text)

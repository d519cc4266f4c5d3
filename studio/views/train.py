"""Train: pictures, a recipe, what it will cost, and Start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time_ns
from typing import Any

import gradio as gr
from markupsafe import Markup

from .. import files
from ..errors import StudioError
from ..services import datasets, drafts, estimates, models, recipes, runs
from . import html
from .bind import Desk
from .html import html as h
from .page import Page, saved, to

FORM = ("dataset", "name", "model", "goal", "method", "trigger", "preset", "advanced")
"""What the draft of this form holds, in the order of its components."""


def build(page: Page) -> None:
    _title("1", "Pictures", "3 to 30 of one subject, or of one style. Captions say what else they show.")
    with gr.Row(equal_height=True):
        dataset = gr.Dropdown([], label="Data set", elem_id="train-dataset", interactive=True, scale=3)
        title = gr.Textbox("", label="Its name", elem_id="train-dataset-name", interactive=True, max_length=80, scale=3)
        with gr.Column(min_width=140, scale=1):
            new = gr.Button("New data set", elem_id="train-new")
            delete = gr.Button("Delete it", elem_id="train-delete", variant="stop")
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop pictures, caption files (dog.txt for dog.jpg) or a zip of them; up to 20 MB each",
            file_count="multiple",
            elem_id="train-files",
            height=150,
            interactive=True,
            scale=3,
        )
        samples = gr.HTML(_samples(), elem_id="train-samples", js_on_load=html.CLICKS)
    report = gr.HTML(elem_id="train-report", js_on_load=html.CLICKS)
    cards = gr.HTML(elem_id="train-cards", js_on_load=html.CLICKS)

    _title("2", "Recipe", "Balanced is a good start; the words under Trigger will call what is learnt.")
    with gr.Row():
        goal = gr.Radio(
            _choices(recipes.GOALS), value="subject", label="What to learn", elem_id="train-goal", interactive=True
        )
        preset = gr.Radio(_choices(recipes.PRESETS), value="balanced", label="How thoroughly", elem_id="train-preset",
                          interactive=True)  # fmt: skip
    with gr.Row():
        trigger = gr.Textbox("", label="Trigger", placeholder="sks face", elem_id="train-trigger", interactive=True,
                             info="A rare word, then what it is.", max_length=100)  # fmt: skip
        name = gr.Textbox("", label="Name of the run", elem_id="train-name", interactive=True, max_length=80,
                          info="Not given, the trigger.")  # fmt: skip
    with gr.Row():
        method = gr.Dropdown(_choices(recipes.METHODS), value="lora", label="Method", elem_id="train-method",
                             interactive=True, info="LoRA unless you know why not.")  # fmt: skip
        model = gr.Dropdown([("Embedded", "embedded")], value="embedded", label="Base model", elem_id="train-model",
                            interactive=True, info="More are added under System.")  # fmt: skip
    advanced = gr.State({})
    with gr.Accordion("Advanced settings", open=False, elem_id="train-advanced"):
        form = gr.HTML(elem_id="train-form", js_on_load=html.CLICKS)

    _title("3", "Review", "")
    review_ = gr.HTML(elem_id="train-review", js_on_load=html.CLICKS)
    start = gr.Button("Start training", variant="primary", elem_id="train-start", size="lg")

    held = [dataset, name, model, goal, method, trigger, preset, advanced]
    shown, told = [dataset, title], [cards, form, review_]
    page.on_open("train", open_, [], [*held, title, *told])
    changes = [
        page.on(new.click, create, None, [*shown, report]),
        page.on(delete.click, throw_away, [dataset], [*shown, report]),
        page.on(report.click, undo, [dataset], [*shown, report], data=True),
        page.on(drop.upload, add, [dataset, drop], [*shown, drop, report]),
        page.on(samples.click, sample, None, [*shown, goal, trigger, report], data=True),
        page.on(dataset.input, choose, [dataset], [title]),
        page.on(cards.click, remove, [dataset], [report], data=True),
    ]
    page.on([change.success for change in changes], tell, held, told)
    page.on([goal.input, preset.input, method.input, model.input], tell, held, told, trigger_mode="always_last")
    page.on([trigger.change, name.change], review, held, [review_], trigger_mode="always_last")
    page.on([title.submit, title.blur], rename, [dataset, title], [dataset])
    page.on(cards.input, caption, [dataset], [], data=True, trigger_mode="multiple")
    # one by one and none left out, however fast somebody fills them in
    filled = page.on(form.input, set_, [advanced], [advanced], data=True, trigger_mode="multiple", concurrency_limit=1)
    page.on(filled.success, judge, held, [cards, review_], trigger_mode="always_last")
    page.on(form.click, reset, held, [advanced, *told], data=True)
    page.on(start.click, begin, held, [page.job, page.turn])


# ---------------------------------------------------------------- handlers: the pictures


def open_(desk: Desk) -> list[Any]:
    """The form as it was left."""
    form = _left(desk)
    own = datasets.list_datasets(desk.ws, desk.user)
    form["dataset"] = form["dataset"] if form["dataset"] in [d.id for d in own] else (own[0].id if own else None)
    choices = {
        "dataset": gr.Dropdown(choices=[(d.name, d.id) for d in own], value=form["dataset"]),
        "model": gr.Dropdown(choices=_models(desk), value=form["model"]),
    }
    return [*(form | choices).values(), choose(desk, form["dataset"]), *tell(desk, *form.values())]


def choose(desk: Desk, dataset: str | None) -> str:
    return datasets.get(desk.ws, desk.user, dataset).name if dataset else ""


def listed(desk: Desk, dataset: str | None) -> tuple[Any, str]:
    """The list of data sets with this one chosen, and its name."""
    choices = [(found.name, found.id) for found in datasets.list_datasets(desk.ws, desk.user)]
    return gr.Dropdown(choices=choices, value=dataset), choose(desk, dataset)


def create(desk: Desk) -> Any:
    return *listed(desk, datasets.create(desk.ws, desk.user, "New data set").id), ""


def throw_away(desk: Desk, dataset: str | None) -> Any:
    datasets.delete(desk.ws, desk.user, dataset)
    rest = datasets.list_datasets(desk.ws, desk.user)
    undo_ = html.button("Undo", "restore", dataset=dataset)
    return *listed(desk, rest[0].id if rest else None), h('<p class="note warn">Deleted. {undo}</p>', undo=undo_)


def undo(desk: Desk, data: Mapping[str, Any], dataset: str | None) -> Any:
    if data.get("act") == "restore":
        dataset = datasets.restore(desk.ws, desk.user, data.get("dataset")).id
    elif data.get("act") == "restore-image":
        datasets.restore_image(desk.ws, desk.user, dataset, str(data.get("picture")))
    return *listed(desk, dataset), ""


def rename(desk: Desk, dataset: str | None, name: str) -> Any:
    if not dataset or not name.strip() or name == datasets.get(desk.ws, desk.user, dataset).name:
        return gr.skip()
    datasets.rename(desk.ws, desk.user, dataset, name)
    return listed(desk, dataset)[0]


def add(desk: Desk, dataset: str | None, paths: list[str]) -> Any:
    dataset = dataset or datasets.create(desk.ws, desk.user, "My pictures").id
    reports = datasets.add_files(desk.ws, desk.user, dataset, desk.own(paths))
    return *listed(desk, dataset), None, added(reports)


def sample(desk: Desk, data: Mapping[str, Any]) -> Any:
    found = datasets.copy_sample(desk.ws, desk.user, str(data.get("sample")))
    said = html.note(f"{len(found.pictures)} pictures and their captions are yours to change.", "good")
    return *listed(desk, found.id), found.goal, found.trigger, said


def remove(desk: Desk, data: Mapping[str, Any], dataset: str) -> Markup:
    picture = str(data.get("picture"))
    datasets.remove_image(desk.ws, desk.user, dataset, picture)
    undo_ = html.button("Undo", "restore-image", picture=picture)
    return h('<p class="note warn">Picture removed. {undo}</p>', undo=undo_)


def caption(desk: Desk, data: Mapping[str, Any], dataset: str) -> None:
    datasets.set_caption(desk.ws, desk.user, dataset, str(data.get("picture")), data.get("value", ""))


# ---------------------------------------------------------------- handlers: the recipe


def tell(desk: Desk, *values: Any) -> tuple[Markup, Markup, Markup]:
    """What the pictures, the advanced settings and the review show for a form."""
    form: dict[str, Any] = dict(zip(FORM, values, strict=True))
    settings = advanced_of(form["method"], form["advanced"], _usual(desk, form))
    return pictures_of(desk, form), settings, review(desk, *values)


def judge(desk: Desk, *values: Any) -> tuple[Markup, Markup]:
    """The same without the settings, which somebody is filling in."""
    pictures, _, cost = tell(desk, *values)
    return pictures, cost


def review(desk: Desk, *values: Any) -> Markup:
    form = saved(desk, "train", FORM, values)
    try:
        dataset, settings = _settings(desk, form)
    except StudioError as error:
        return html.note(error, "warn")
    return reviewed(desk, dataset, settings)


def set_(desk: Desk, data: Mapping[str, Any], advanced: Mapping[str, Any]) -> dict[str, Any]:
    return {**advanced, str(data.get("field")): data.get("value")}


def reset(desk: Desk, data: Mapping[str, Any], *values: Any) -> Any:
    return {}, *tell(desk, *values[:-1], {})


def begin(desk: Desk, *values: Any) -> Any:
    form = _recipe(saved(desk, "train", FORM, values))
    job = runs.start_training(desk.ws, desk.user, form.pop("dataset"), form)
    gr.Info("In the queue. Closing this page does not stop it.")
    return job, to("runs", "train")


def _left(desk: Desk) -> dict[str, Any]:
    """The draft, in the order of `FORM`."""
    usual = {"dataset": None, "name": "", "model": "embedded", "goal": "subject", "method": "lora", "trigger": "",
             "preset": "balanced", "advanced": {}}  # fmt: skip
    return usual | {key: value for key, value in drafts.load(desk.ws, desk.user, "train").items() if key in usual}


def _recipe(form: Mapping[str, Any]) -> dict[str, Any]:
    """The form as `runs.start_training` takes it; a run without a name is called by its trigger."""
    if not form["dataset"]:
        raise StudioError("Add pictures first: drop some above, or take one of the samples.")
    return {**form, "name": form["name"].strip() or form["trigger"].strip()}


def _settings(desk: Desk, form: Mapping[str, Any]) -> tuple[datasets.Dataset, dict[str, Any]]:
    recipe = _recipe(form)
    dataset = datasets.get(desk.ws, desk.user, recipe.pop("dataset"))
    return dataset, runs.settings_of(desk.ws, dataset, recipe)


def _usual(desk: Desk, form: Mapping[str, Any]) -> dict[str, Any]:
    """What the first choices set, by field; nothing while they are not complete."""
    try:
        trigger = form["trigger"].strip() or "sks thing"
        return recipes.values(_settings(desk, {**form, "trigger": trigger, "advanced": {}})[1])
    except StudioError:
        return {}


def _models(desk: Desk) -> list[tuple[str, str]]:
    return [(model.name, model.name) for model in models.list_models(desk.ws)]


# ---------------------------------------------------------------- what they show


def _title(number: str, title: str, hint: str) -> None:
    text = h('<div class="section-title"><h3>{n} · {t}</h3><p>{hint}</p></div>', n=number, t=title, hint=hint)
    gr.HTML(text, js_on_load=None)


def _choices(known: Mapping[str, recipes.Choice]) -> list[tuple[str, str]]:
    return [(choice.title, key) for key, choice in known.items()]


def _samples() -> Markup:
    buttons = html.join(html.button(s.title, "sample", sample=s.key) for s in datasets.SAMPLES)
    return h(
        '<p class="note plain">No pictures at hand? Begin with a sample:</p><div class="line">{b}</div>', b=buttons
    )


def pictures_of(desk: Desk, form: Mapping[str, Any]) -> Markup:
    """A card for each picture, with its caption and what the doctor says of it."""
    if not form["dataset"]:
        return html.empty("No pictures yet.", "Drop some above, or begin with one of the samples.")
    dataset = datasets.get(desk.ws, desk.user, form["dataset"])
    findings = datasets.doctor(dataset, _resolution(desk, form))
    general = html.notes(f.message for f in findings if f.picture is None)
    said: dict[str, list[str]] = {}
    for finding in findings:
        said.setdefault(finding.picture or "", []).append(finding.message)
    cards = html.join(_picture(dataset, picture, said.get(picture.id, [])) for picture in dataset.pictures)
    return h('{general}<div class="cards">{cards}</div>', general=general, cards=cards)


def _resolution(desk: Desk, form: Mapping[str, Any]) -> int:
    """Side of the training squares: as it is set, or else the model's own."""
    try:
        set_here = int(form["advanced"].get("resolution") or 0)
    except (TypeError, ValueError):
        set_here = 0
    return set_here or models.resolution(models.source_of(desk.ws, form["model"]))


def _picture(dataset: datasets.Dataset, picture: datasets.Picture, said: Sequence[str]) -> Markup:
    where = files.url("datasets", dataset.id, f"small/{picture.thumbnail.name}")
    return h(
        '<div class="card">{image}<span class="name" title="{name}">{name}</span>'
        '<textarea data-field="caption" data-picture="{id}" aria-label="Caption of {name}" placeholder="Caption" '
        'maxlength="1000">{caption}</textarea><span class="warns">{said}</span>{remove}</div>',
        image=html.picture(where, picture.caption or picture.name),
        name=picture.name,
        id=picture.id,
        caption=picture.caption,
        said=html.join(said, "; "),
        remove=html.button("Remove", "remove", f"Remove {picture.name}", picture=picture.id),
    )


def added(reports: Sequence[datasets.FileReport]) -> Markup:
    refused = [f"{report.name} {report.message}" for report in reports if report.picture is None]
    kept = len(reports) - len(refused)
    good = html.note(f"{kept} {'file' if kept == 1 else 'files'} added.", "good") if kept else Markup()
    return good + html.notes(refused, "bad")


def reviewed(desk: Desk, dataset: datasets.Dataset, settings: Mapping[str, Any]) -> Markup:
    cost = estimates.estimate(settings, len(dataset.pictures), desk.ws)
    known = {"Time": cost.time, "Memory": cost.memory, "Disk": cost.disk, "Estimated by": cost.basis}
    return h(
        "{facts}<details><summary>The same from the command line</summary>"
        '<pre class="command">{command}</pre>{copy}</details>',
        facts=html.facts(known | {"Steps": settings["max_train_steps"]}),
        command=(command := recipes.command_line(settings)),
        copy=html.copy_button(command, "Copy command"),
    )


def advanced_of(method: str, set_values: Mapping[str, Any], usual: Mapping[str, Any]) -> Markup:
    """Every setting that means something for the method; the browser filters them while one types."""
    fields = recipes.fields_for(method)
    return h(
        '<input class="filter" type="search" data-filter placeholder="Search settings …" aria-label="Search settings">'
        '{reset}<div class="fields" data-shown="{shown}">{fields}</div>',
        reset=html.button("Back to the preset", "reset", kind="plain"),
        shown=time_ns(),  # the same content again would not be shown anew, and what was typed would stay
        fields=html.join(html.field(f, set_values.get(f.name, usual.get(f.name, f.default))) for f in fields),
    )

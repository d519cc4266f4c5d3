"""What programs may ask of the studio, through `gradio_client` and the same login as the page.

    from gradio_client import Client
    studio = Client("http://127.0.0.1:7860")
    job = studio.predict(dataset, "subject", "sks face", api_name="/start")

Whatever makes pictures or adapters is a job: it answers with an id, and `status` tells how it goes and what it made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import gradio as gr

from . import files
from .errors import StudioError
from .jobs import store
from .services import blending, drawing, library, runs
from .views.bind import Binder, Desk


def start(
    desk: Desk,
    dataset: str,
    goal: str,
    trigger: str,
    method: str = "lora",
    preset: str = "balanced",
    model: str = "embedded",
    name: str = "",
    advanced: dict[str, Any] | None = None,
) -> str:
    """Train on a data set; the job's id. `advanced` are further settings such as {"max_train_steps": 100}."""
    recipe = {"goal": goal, "trigger": trigger, "method": method, "preset": preset, "model": model}
    return runs.start_training(desk.ws, desk.user, dataset, recipe | {"name": name, "advanced": advanced or {}})


def status(desk: Desk, job: str) -> dict[str, Any]:
    """How a job stands: state, step, total, message, place in the queue, and addresses of the pictures it has drawn."""
    found = store.owned(desk.ws, desk.user, job)
    told = {name: getattr(found, name) for name in ("id", "kind", "state", "step", "total", "message", "position")}
    cells = drawing.pictures(desk.ws, desk.user, job)
    drawn = [files.url("jobs", found.id, cell.picture.name) for cell in cells if cell.picture]
    adapter = blending.saved(desk.ws, desk.user, job) if found.kind == "blend" else None
    return told | {"pictures": drawn, "adapter": adapter}


def stop(desk: Desk, job: str, now: bool = False) -> str:
    """Ask a job to stop; its state then. A training saves first; `now` allows it half a minute for that."""
    store.request(desk.ws, desk.user, job, "stop_now" if now else "stop")
    return store.owned(desk.ws, desk.user, job).state


def list_adapters(desk: Desk, query: str = "") -> list[dict[str, Any]]:
    """The adapters of the library that match all words of a query."""
    keys = ("id", "name", "base", "method", "rank", "trigger")
    found = library.list_adapters(desk.ws, desk.user, query)
    return [{key: getattr(adapter, key) for key in keys} | {"tags": list(adapter.tags)} for adapter in found]


def blend(
    desk: Desk,
    name: str,
    adapters: dict[str, float],
    kind: str = "svd",
    model: str = "embedded",
    options: dict[str, Any] | None = None,
) -> str:
    """Blend adapters, given by id with their weights, into the library; the job's id."""
    return blending.save_blend(desk.ws, desk.user, name, adapters, kind, model, options)


def generate(
    desk: Desk,
    prompts: list[str],
    seeds: list[int] | None = None,
    adapters: dict[str, float] | None = None,
    model: str = "embedded",
    steps: int = 20,
) -> str:
    """Draw each prompt from each seed with weighted adapters; the job's id."""
    return drawing.draw(desk.ws, desk.user, prompts, seeds or [0], adapters or {}, model, steps=steps)


FUNCTIONS = (start, status, stop, list_adapters, blend, generate)


def add(binder: Binder) -> None:
    """Publish the functions on the blocks that are being built."""
    for function in FUNCTIONS:
        gr.api(_public(binder, function), api_name=function.__name__, concurrency_limit=None)


def _public(binder: Binder, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for whoever sends the request; what cannot be done is told in its own words."""

    def run(request: gr.Request, *values: Any) -> Any:
        try:
            return function(binder.desk(request), *values)
        except StudioError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return _signed(run, function)


def _signed(run: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under the name, types and defaults of `function`, from which Gradio makes its form of the interface."""
    types = get_type_hints(function)
    own = [p.replace(annotation=types[p.name]) for p in inspect.signature(function).parameters.values()]
    asking = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
    run.__signature__ = inspect.Signature([asking, *own[1:]], return_annotation=types["return"])  # pyright: ignore
    run.__annotations__ = {p.name: p.annotation for p in own[1:]} | {"request": gr.Request, "return": types["return"]}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run

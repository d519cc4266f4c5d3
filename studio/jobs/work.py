"""What a job does, by its kind. The only file of the studio that imports model libraries, and only when called.

A kind is a function of its `Task` and the `Warm` pipeline. It checks `task.check()` wherever stopping loses nothing,
and writes into `task.out` whole files or none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.atomic import atomic
from ...core.runs.events import Plan, Progress, Stopped
from ...core.runs.settings import from_plain
from ..errors import StudioError
from ..shelf import shelve
from ..workspace import write_json
from .task import Asked, Leaving, Task

if TYPE_CHECKING:
    from PIL.Image import Image

Work = Callable[[Task, "Warm"], None]
WORK: dict[str, Work] = {}


def kind(work: Work) -> Work:
    """Register a function as the kind of job that is named like it."""
    WORK[work.__name__] = work
    return work


class Warm:
    """The pipeline that was used last, kept in memory between jobs."""

    def __init__(self, device: str):
        self.device: Literal["auto", "cpu"] = "cpu" if device == "cpu" else "auto"
        self._model: str | None = None
        self._pipe: Any = None

    @staticmethod
    def load_libraries() -> None:
        """Import what drawing needs, which takes seconds the first time."""
        from diffusers import StableDiffusionPipeline  # noqa: F401  (importing it is the purpose)

        from ...diffusion import dreambooth, pipeline, session  # noqa: F401

    def pipeline(self, model: str) -> Any:
        """The pipeline at a source, without adapters."""
        from ...diffusion.generate import DrawOptions
        from ...diffusion.pipeline import detach

        if model != self._model:
            self.clear()
            self._pipe = DrawOptions(model=model, device=self.device).load_pipeline()
            self._model = model
        return detach(self._pipe)

    def clear(self) -> None:
        """Give its memory back."""
        self._model = self._pipe = None


# -------------------------------------------------------------------------------- training


@kind
def train(task: Task, warm: Warm) -> None:
    """DreamBooth, by the very code of the command line. Arguments: `config`, its settings; pictures in `data/`."""
    from ...diffusion.dreambooth import DreamBooth, DreamBoothConfig

    warm.clear()  # the run needs the memory
    places = {
        "instance_data_dir": task.job.folder / "data",
        "output_dir": task.out,
        "device": warm.device,
    }
    booth = DreamBooth(from_plain(DreamBoothConfig, task.arguments["config"] | places))
    task.answer("stop", booth.stop)
    task.answer("stop_now", booth.stop)
    task.answer("sample_now", booth.sample)
    task.answer("save_now", booth.save)
    planned = False
    for event in booth.run():
        task.tell(event)
        planned = planned or isinstance(event, Plan)
        if isinstance(event, Stopped):
            raise (Asked if task.stopping else Leaving)(task.record.message)
        if not planned:  # preparing may take long, and none of it is lost
            task.check()


# -------------------------------------------------------------------------------- pictures


@kind
def draw(task: Task, warm: Warm) -> None:
    """Prompts by seeds. Arguments: `model`, `adapters` (each `path`
    within the workspace, `name`, `weight`), `options`, `cells` (each `file`,
    `prompt`, `seed`)."""
    pipe = _with_adapters(task, warm)
    _fill(task, pipe, task.arguments["cells"])


@kind
def compare(task: Task, warm: Warm) -> None:
    """The same prompt and seed with different adapters. Arguments: `draw`'s, each cell with its own `weights`, one for
    each adapter."""
    pipe = _with_adapters(task, warm)
    for done, cell in enumerate(task.arguments["cells"]):
        _weigh(pipe, task, cell["weights"])
        _fill(task, pipe, [cell], done, len(task.arguments["cells"]))


@kind
def grid(task: Task, warm: Warm) -> None:
    """A blend at many weights. Arguments: `compare`'s, and `combination`, the options of `CombineOptions`; cells with
    `combine` show the blend of those weights, the others the adapters themselves."""
    from ...diffusion.blend import CombineOptions

    options = CombineOptions(**task.arguments["combination"])
    pipe = _with_adapters(task, warm)
    cells = task.arguments["cells"]
    shown: Any = None
    for done, cell in enumerate(cells):
        task.check()
        wanted = (cell["weights"], cell["combine"])
        if wanted != shown:  # along a row of seeds the blend stays
            (_combine if cell["combine"] else _weigh)(pipe, task, cell["weights"], *[options] * cell["combine"])
            shown = wanted
        _fill(task, pipe, [cell], done, len(cells))


def _with_adapters(task: Task, warm: Warm) -> Any:
    """The warm pipeline with the job's adapters on it, each at its weight; cells may set others."""
    from ...diffusion.pipeline import load_adapter

    task.tell(Progress("Loading", 0, len(task.arguments["cells"])))
    pipe = warm.pipeline(task.arguments["model"])
    for adapter in _inputs(task, [1.0] * len(task.arguments["adapters"])):
        load_adapter(pipe, adapter.path, adapter.name)
    _weigh(pipe, task)
    return pipe


def _inputs(task: Task, weights: Sequence[float] | None = None) -> list[Any]:
    """The job's adapters where they lie, at their own or other weights; those at 0 are left out."""
    from ...core.weighted import Weighted

    asked = task.arguments["adapters"]
    at = [adapter["weight"] for adapter in asked] if weights is None else weights
    return [
        Weighted(adapter["name"], str(task.ws.root / adapter["path"]), weight)
        for adapter, weight in zip(asked, at, strict=True)
        if weight != 0
    ]


def _weigh(pipe: Any, task: Task, weights: Sequence[float] | None = None) -> None:
    """Let the adapters run side by side at these weights, those at 0 not at all."""
    from ...diffusion.pipeline import adapted_models, set_weights

    running = {adapter.name: adapter.weight for adapter in _inputs(task, weights)}
    for model in adapted_models(pipe).values():
        model.activate(*[name for name in running if name in model.configs])
    set_weights(pipe, running)


def _combine(pipe: Any, task: Task, weights: Sequence[float], options: Any) -> None:
    """Show the blend at these weights alone; of one adapter the blend is itself."""
    from ...diffusion.blend import BLEND, combine_loaded, show_only
    from ...diffusion.pipeline import remove_adapter

    inputs = _inputs(task, weights)
    if len(inputs) < 2:
        _weigh(pipe, task, weights)
        return
    remove_adapter(pipe, BLEND)
    combine_loaded(pipe, inputs, options)
    show_only(pipe, BLEND)


def _fill(task: Task, pipe: Any, cells: Sequence[dict[str, Any]], done: int = 0, total: int | None = None) -> None:
    """Draw each cell's prompt from its seed, and write its file."""
    from ...diffusion.sample import generate_each

    total = total or len(cells)
    images = generate_each(pipe, [(cell["prompt"], cell["seed"]) for cell in cells], **task.arguments["options"])
    for number, (cell, image) in enumerate(_checked(task, zip(cells, images, strict=True)), done + 1):
        save_png(image, task.out / cell["file"])
        task.tell(Progress("Pictures", number, total))


def _checked(task: Task, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        yield item
        task.check()


def save_png(image: Image, path: Path) -> None:
    with atomic(path) as temporary:
        image.save(temporary, "PNG")


# -------------------------------------------------------------------------------- files


@kind
def blend(task: Task, warm: Warm) -> None:
    """One adapter of several, saved into the library. Arguments: `model`, `adapters`, `combination`, `card`, and
    `prompt` with `seed` of the preview."""
    from ...diffusion.blend import BLEND, CombineOptions, combine_loaded, recipe, show_only
    from ...diffusion.pipeline import save_adapter

    wanted, options = task.arguments, CombineOptions(**task.arguments["combination"])
    pipe = _with_adapters(task, warm)
    inputs = _inputs(task)
    blended = combine_loaded(pipe, inputs, options)
    task.check()
    save_adapter(task.out, blended.adapters, recipe(inputs, options, wanted["base"]))
    show_only(pipe, BLEND)
    _fill(task, pipe, wanted["cells"])
    told = {name: report.error for name, report in blended.reports.items()}
    errors = {name: error for name, error in told.items() if error == error}  # NaN: no target to miss
    configs: list[Any] = [config for config, _ in blended.adapters.values()]  # a blend is a LoRA
    ranks = {rank for config in configs for rank in (config.r, *config.rank_pattern.values())}
    card = wanted["card"] | {"rank": sorted(ranks)}
    adapter = shelve(task.ws, task.job.owner, task.out, card, task.out / wanted["cells"][0]["file"])
    write_json(task.out / "blend.json", {"adapter": adapter, "errors": errors})


@kind
def convert(task: Task, warm: Warm) -> None:
    """An adapter for another program. Arguments: `path`, `file` (the result's name), `options` of `ConvertConfig`."""
    from ...diffusion.convert import ConvertConfig, convert_adapter

    source = task.ws.root / task.arguments["path"]
    task.tell(Progress("Converting", 0, 1))
    options = task.arguments["options"]
    done = convert_adapter(
        ConvertConfig(source=source, out=task.out / task.arguments["file"], overwrite=True, **options)
    )
    write_json(task.out / "report.json", asdict(done) | {"out": task.arguments["file"]})
    task.tell(Progress("Converting", 1, 1))


# -------------------------------------------------------------------------------- base models


@kind
def fetch(task: Task, warm: Warm) -> None:
    """A base model onto the list. Arguments: `what` ("hub" or "file"), `source`, `name`."""
    from ..services import models

    source, made = task.arguments["source"], task.out / "pipeline"
    if task.arguments["what"] == "hub":
        _run_fetch(task, "hub", source)
    else:
        _run_fetch(task, "file", source, str(made))
        home = task.ws.converted(task.job.id)
        home.parent.mkdir(exist_ok=True)
        made.rename(home)
        source = str(home)
    models.add(task.ws, task.job.owner, source, task.arguments["name"])


def _run_fetch(task: Task, *arguments: str) -> None:
    """`fetch.py` as a child, the only process here that may use the network."""
    task.tell(Progress("Megabytes", 0, 1))
    command = [sys.executable, "-m", "veneer.studio.jobs.fetch", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "0"}
    ) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                told = json.loads(line)
                if "failed" in told:
                    raise StudioError(f"It could not be fetched: {told['failed']}")
                task.tell(Progress("Megabytes", told["done"], told["total"]))
                task.check()
        finally:
            child.kill()

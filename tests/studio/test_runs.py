"""Trainings from the form to the library, pictures and blends, by the worker as it is. One process for all of it."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file
from veneer.studio.errors import PermissionDenied, StudioError
from veneer.studio.jobs import store, supervisor
from veneer.studio.jobs.processes import pid_of
from veneer.studio.jobs.processes import runs as lives
from veneer.studio.services import blending, datasets, drawing, library, references, runs
from veneer.studio.workspace import Workspace, read_json

STEPS = 24
QUICK = {
    "max_train_steps": STEPS, "checkpointing_steps": 4, "sample_every": 12, "sample_steps": 1, "train_batch_size": 1,
    "class_prompt": "", "sample_prompts": "a photo of sks face", "unet.rank": 2, "unet.conv": False,
    "text_encoder.method": "none", "unet.feed_forward": False, "num_class_images": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def ws(tmp_path_factory) -> Iterator[Workspace]:
    ws = Workspace(tmp_path_factory.mktemp("studio"))
    (ws.root / "jobs").mkdir()
    yield ws
    kill_worker(ws)


@pytest.fixture(scope="module")
def dataset(ws) -> str:
    return datasets.copy_sample(ws, "ann", "robot").id


def kill_worker(ws: Workspace) -> None:
    known = read_json(ws.workers / "cpu.json")
    if known and lives(known["process"]):
        os.killpg(pid_of(known["process"]), signal.SIGKILL)
        until(lambda: not lives(known["process"]))


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.02)


def finish(ws, job: str, wanted: str = "done") -> store.Job:
    supervisor.ensure_worker(ws, "cpu")
    until(lambda: store.load(ws, job).state in (wanted, "failed", "interrupted", "done", "stopped"))
    found = store.load(ws, job)
    assert found.state == wanted, f"{found.state}: {found.message}\n{store.log(ws, found.owner, job)}"
    return found


def start(ws, dataset: str, **advanced) -> str:
    recipe = {"goal": "subject", "method": "lora", "trigger": "sks face", "preset": "fast", "name": "Robot"}
    return runs.start_training(ws, "ann", dataset, recipe | {"advanced": QUICK | advanced})


def weights(ws, job: str) -> dict[str, bytes]:
    """Without the file's header, which holds the recipe."""
    path = ws.job(job) / "out" / "unet" / "adapter_model.safetensors"
    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def trained(ws, dataset) -> str:
    """A run that nothing disturbed."""
    return finish(ws, start(ws, dataset)).id


@pytest.fixture(scope="module")
def adapters(ws, trained) -> list[str]:
    """Two adapters in the library: the finished one, and a checkpoint."""
    return [runs.add_to_library(ws, "ann", trained), runs.add_to_library(ws, "ann", trained, 12, "Half way")]


def test_a_training_shows_how_it_goes(ws, trained):
    now = runs.progress(ws, "ann", trained)
    assert [point.step for point in now.points] == list(range(1, STEPS + 1))
    assert now.sampled == (0, 12, 24)
    assert [(row.prompt, row.seed) for row in now.samples] == [("a photo of sks face", 0)]
    assert all(picture and picture.is_file() for picture in now.samples[0].pictures)
    assert now.checkpoints[-1] == STEPS
    assert now.finished
    assert (now.job.step, now.job.total) == (STEPS, STEPS)
    with pytest.raises(PermissionDenied):
        runs.progress(ws, "bob", trained)
    told, _ = store.events(ws, "ann", trained)
    assert {event["event"] for event in told} >= {"Plan", "Step", "Sample", "Checkpoint", "Done"}


def test_stop_saves_and_resume_goes_on(ws, dataset, trained):
    job = start(ws, dataset, sample_seeds="2")
    supervisor.ensure_worker(ws, "cpu")
    until(lambda: len(runs.progress(ws, "ann", job).points) >= 2)
    store.request(ws, "ann", job, "sample_now")
    store.request(ws, "ann", job, "save_now")
    until(lambda: runs.progress(ws, "ann", job).sampled[1:] and runs.progress(ws, "ann", job).checkpoints)
    store.request(ws, "ann", job, "stop")
    stopped = finish(ws, job, "stopped")
    assert runs.progress(ws, "ann", job).checkpoints[-1] == stopped.step < STEPS
    assert str(stopped.step) in stopped.message
    store.resume(ws, "ann", job)
    finish(ws, job)
    assert weights(ws, job) == weights(ws, trained)  # samples and checkpoints on demand change nothing


def test_what_was_learnt_goes_into_the_library(ws, adapters, trained):
    finished, half = (library.get(ws, "ann", adapter) for adapter in adapters)
    assert (finished.name, finished.method, finished.rank, finished.base) == ("Robot", "LoRA", "2", "embedded")
    assert finished.trigger == "a photo of sks face"
    assert finished.preview is not None
    assert half.name == "Half way"
    with pytest.raises(StudioError, match="step 5"):
        runs.add_to_library(ws, "ann", trained, 5)
    with pytest.raises(PermissionDenied):
        runs.add_to_library(ws, "bob", trained)


def test_pictures_depend_on_adapter_and_weight(ws, adapters, trained):
    sides = [{}, {adapters[0]: 0.0}, {adapters[0]: 1.0}, {f"{trained}:final": 1.0}]
    job = finish(ws, drawing.compare(ws, "ann", "a photo of sks face", 0, sides, steps=1))
    bare, off, on, final = (pixels(cell.picture) for cell in drawing.pictures(ws, "ann", job.id))
    assert bare == off
    assert on != bare
    assert on == final
    drawn = finish(ws, drawing.draw(ws, "ann", ["a face", "a bear"], [0, 1], {adapters[0]: 0.5}, steps=1))
    asked = [(cell.prompt, cell.seed) for cell in drawing.pictures(ws, "ann", drawn.id)]
    assert asked == [("a face", 0), ("a face", 1), ("a bear", 0), ("a bear", 1)]


def pixels(path: Path | None) -> bytes:
    assert path is not None
    with Image.open(path) as image:
        return image.tobytes()


def test_a_grid_has_baselines_and_its_cells_are_their_blends(ws, adapters):
    first, second = adapters
    weighted = {first: 1.0, second: 1.0}
    job = finish(
        ws,
        blending.preview_grid(
            ws,
            "ann",
            weighted,
            "cat",
            "a photo of sks face",
            ("weight-1", [0.0, 1.0]),
            ("weight-2", [0.0, 1.0]),
            steps=1,
        ),
    )
    cells = {(cell.row, cell.column): cell for cell in drawing.pictures(ws, "ann", job.id)}
    assert cells[-1, 0].label == "no adapter"
    assert pixels(cells[0, 0].picture) == pixels(cells[-1, 0].picture)
    assert pixels(cells[1, 0].picture) == pixels(cells[-1, 1].picture)
    assert cells[1, 1].weights == (1.0, 1.0)
    assert pixels(cells[1, 1].picture) != pixels(cells[1, 0].picture)


@pytest.mark.parametrize(("kind", "options"), [("svd", {"svd_rank": 2}), ("ties", {"density": 0.5})])
def test_a_blend_goes_into_the_library_with_its_recipe(ws, adapters, kind, options):
    job = finish(ws, blending.save_blend(ws, "ann", kind, {adapters[0]: 0.8, adapters[1]: 0.4}, kind, options=options))
    saved = blending.saved(ws, "ann", job.id)
    found = library.get(ws, "ann", saved)
    assert (found.name, found.rank) == (kind, "2")
    assert found.recipe["combination_type"] == kind
    assert load_file(found.folder / "unet" / "adapter_model.safetensors")


def test_ways_to_blend_are_told_with_their_reasons(ws, adapters, tmp_path):
    reasons = {kind.name: kind.reason for kind in blending.kinds(ws, "ann", adapters)}
    assert not any(reasons.values())
    assert all(kind.reason for kind in blending.kinds(ws, "ann", adapters[:1]))
    with pytest.raises(StudioError, match="reads no density"):
        blending.combination(ws, "ann", adapters, "svd", {"density": 0.5})
    with pytest.raises(StudioError, match="Density is a number"):
        blending.combination(ws, "ann", adapters, "ties", {"density": 3})


def test_adapters_of_other_ranks_cannot_merge_their_factors(ws, adapters, dataset):
    job = finish(ws, start(ws, dataset, **{"unet.rank": 3, "max_train_steps": 1, "sample_every": 0}))
    other = f"{job.id}:final"
    reasons = {kind.name: kind.reason for kind in blending.kinds(ws, "ann", [adapters[0], other])}
    assert "equal ranks" in reasons["ties"]
    assert reasons["svd"] == reasons["slerp"] == reasons["ties_svd"] == ""
    with pytest.raises(StudioError, match="equal ranks"):
        blending.save_blend(ws, "ann", "x", {adapters[0]: 1.0, other: 1.0}, "ties")
    three = {kind.name: kind.reason for kind in blending.kinds(ws, "ann", [*adapters, other])}
    assert "takes 2" in three["slerp"]


@pytest.mark.parametrize("weight", [float("nan"), 9, "1", None, [1]])
def test_weights_that_are_none(ws, adapters, weight):
    with pytest.raises(StudioError, match="no weight"):
        references.inputs(ws, "ann", {adapters[0]: weight})


def test_a_training_of_nothing_is_refused(ws):
    empty = datasets.create(ws, "ann", "Empty").id
    with pytest.raises(StudioError, match="no pictures"):
        start(ws, empty)

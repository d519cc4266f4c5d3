"""The stream's consumers, the contact sheet, and drawing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from veneer.core.runs.followers import EventFile
from veneer.core.runs.random_state import derived_seed, shuffled
from veneer.diffusion import Done, Notice, Plan, ProgressBar, Step, contact_sheet, generate_each, load_pipeline
from veneer.diffusion.sample import SAMPLERS, generate, make_sampler


def step(number: int) -> Step:
    return Step(number, 0.5, {"instance": 0.5}, {"unet": 1e-3}, {"unet": 0.1}, 0.1, 1.0)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = EventFile(tmp_path / "metrics.jsonl")
    metrics.truncate(3)
    for number in range(1, 6):
        metrics.write(step(number))
    metrics.write(Notice("not a step"))
    with metrics.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    metrics.truncate(3)
    metrics.write(step(4))
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_the_progress_bar_shows_loss_and_returns_the_last_event(tmp_path, capsys):
    plan = Plan(
        model="embedded",
        family="tiny_sd",
        prediction_type="v_prediction",
        resolution=64,
        instance_images=5,
        class_images=0,
        trainable={"unet": 1000},
        start_step=0,
        max_train_steps=2,
        device="cpu",
    )
    done = Done(2, tmp_path)
    assert ProgressBar().follow([plan, Notice("skipped x.png"), step(1), step(2), done]) is done
    said = "".join(capsys.readouterr())
    for words in ("trainable: unet 1,000", "note: skipped x.png", "loss=0.5000", "2/2", f"done: step 2, {tmp_path}"):
        assert words in said


def test_every_image_is_visited_once_an_epoch():
    first, second = shuffled(0, "instance", 7, 0, 7), shuffled(0, "instance", 7, 7, 7)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(7))
    assert not torch.equal(first, second)
    assert torch.equal(shuffled(0, "instance", 7, 5, 4), torch.cat([first[5:], second[:2]]))


def test_seeds_never_change():
    """A checkpoint of today must go on tomorrow with the same draws."""
    assert derived_seed(0, "batch", 17) == 5538600174847586223


def test_contact_sheet_has_a_place_for_everything():
    wide, tall = Image.new("RGB", (80, 40), "red"), Image.new("L", (20, 60), 0)
    rows = [
        ("step 0", [("a very long caption that cannot fit on two lines of text", wide), ("b", tall)]),
        ("step 10", []),
    ]
    sheet = contact_sheet(rows, cell=64)
    colours = {colour for _, colour in sheet.getcolors(1 << 20) or []}
    assert {(255, 0, 0), (0, 0, 0), (255, 255, 255)} <= colours
    assert sheet.width > 2 * 64
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([("empty", [])])


def test_an_image_depends_on_its_seed_and_not_on_its_batch():
    pipe = load_pipeline("embedded")
    state = torch.random.get_rng_state()
    rows = generate(pipe, ["a cat", "a red apple"], [3, 4], steps=2, batch_size=4)
    (alone,) = generate_each(pipe, [("a red apple", 3)], steps=2, batch_size=1)
    difference = np.abs(np.asarray(rows[1][0], dtype=int) - np.asarray(alone, dtype=int))
    assert difference.max() <= 2
    assert not np.array_equal(np.asarray(rows[0][0]), np.asarray(rows[0][1]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("name", [*SAMPLERS, "pipeline"])
def test_every_sampler_honours_the_prediction_type(name):
    pipe = load_pipeline("embedded")
    assert make_sampler(pipe, name).config["prediction_type"] == "v_prediction"
    with pytest.raises(ValueError, match="unknown"):
        make_sampler(pipe, "magic")

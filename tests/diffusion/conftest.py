"""Small material for the tests: a few pictures, and runs that take seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from veneer.diffusion import AdapterOptions, DreamBoothConfig
from veneer.diffusion.families import EMBEDDED_PATH

torch.set_num_threads(1)

SMALL = AdapterOptions(rank=2, learning_rate=1e-3)


def draw_picture(index: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A disc on a plain ground, different for each index."""
    picture = Image.new("RGB", size, [(255, 255, 255), (120, 170, 230), (240, 220, 90), (150, 210, 140)][index % 4])
    x, y = 8 + 3 * index, 12 + 2 * index
    ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 34), fill=(200, 60, 50), outline=(60, 20, 20), width=3)
    return picture


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of four pictures of 64 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        draw_picture(index).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, images: Path) -> Callable[..., DreamBoothConfig]:
    """A run of two steps without samples, unless told otherwise."""

    def make(**changes) -> DreamBoothConfig:
        values = {
            "instance_data_dir": images,
            "instance_prompt": "a photo of sks disc",
            "output_dir": tmp_path / "run",
            "unet": SMALL,
            "text_encoder": SMALL,
            "max_train_steps": 2,
            "sample_seeds": (),
            "sample_steps": 2,
            "device": "cpu",
        }
        return DreamBoothConfig(**(values | changes))

    return make


@pytest.fixture
def pipeline_predicting(tmp_path: Path) -> Callable[[str], Path]:
    """The embedded pipeline with another prediction type in its scheduler."""

    def make(prediction_type: str) -> Path:
        folder = tmp_path / f"pipeline-{prediction_type}"
        shutil.copytree(EMBEDDED_PATH, folder)
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": prediction_type}))
        return folder

    return make

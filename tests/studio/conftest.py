"""What the studio's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from veneer.studio.jobs import store
from veneer.studio.services import datasets, runs
from veneer.studio.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "studio")


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three different pictures of 64 pixels, the first with a caption beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, colour in enumerate(("white", "skyblue", "gold")):
        picture = Image.new("RGB", (64, 64), colour)
        left = 6 + 12 * index
        ImageDraw.Draw(picture).ellipse((left, 12, left + 30, 46), fill="firebrick", outline="black", width=3)
        picture.save(folder / f"disc {index}.png")
    (folder / "disc 0.txt").write_text("a photo of sks disc on white\n")
    return sorted(folder.iterdir())


@pytest.fixture
def small_run(photos: list[Path]) -> Callable[..., str]:
    """Queue a training of a few seconds; its id. Same arguments, same results."""

    def start(ws: Workspace, user: str = "me", name: str = "disc", **changes: Any) -> str:
        dataset = datasets.create(ws, user, "Discs")
        datasets.add_files(ws, user, dataset.id, photos)
        dataset = datasets.get(ws, user, dataset.id)
        small = {"method": "lora", "rank": 2}
        settings = runs.settings_of(ws, dataset, {"goal": "subject", "method": "lora", "trigger": "sks disc"}) | {
            "max_train_steps": 12,
            "checkpointing_steps": 2,
            "sample_every": 6,
            "sample_steps": 2,
            "sample_prompts": ["a photo of sks disc"],
            "sample_seeds": [0],
            "class_prompt": None,
            "unet": small,
            "text_encoder": small,
        }
        arguments = {"dataset": dataset.id, "name": name, "recipe": {}, "config": settings | changes}
        return store.submit(ws, user, "train", arguments, lambda folder: datasets.snapshot(dataset, folder / "data"))

    return start

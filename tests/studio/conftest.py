"""What the studio's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw
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

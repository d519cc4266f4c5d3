"""Training pictures: the usable ones of a folder, and each cut to training size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..core.errors import DataError
from .images import caption_of, find_files, read_image


@dataclass(frozen=True)
class Example:
    """An image that was read successfully once, and the prompt that goes with it."""

    path: Path
    prompt: str
    size: tuple[int, int]
    """Width and height in pixels, as a person sees it."""


@dataclass(frozen=True)
class ImageFolder:
    """The usable images of a folder in natural order, and a line for each that was skipped."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...]


def scan(folder: Path, prompt: str, smallest: int) -> ImageFolder:
    """Read every image of `folder` once, so that a bad file shows now and not at step 300.

    **Arguments**: `prompt` for images without a caption file; images whose shorter side is below `smallest` pixels are
    skipped. Raises `DataError` when nothing usable is left, or when more than half of the files had to be skipped: then
    something is wrong with the folder, and the run would learn something else than was meant.
    """
    files = find_files(folder)
    examples, skipped = [], []
    for path in files:
        try:
            size = read_image(path).size
        except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
            reason = str(error).replace(str(path), path.name) or type(error).__name__
            skipped.append(f"{path.name}: cannot be read ({reason})")
            continue
        if min(size) < smallest:
            skipped.append(f"{path.name}: too small ({size[0]}x{size[1]} pixels, shorter side below {smallest})")
        else:
            examples.append(Example(path, caption_of(path, prompt), size))
    if not files:
        raise DataError(f"{folder} holds no images")
    if len(skipped) > len(files) / 2 or not examples:
        reasons = "; ".join(skipped[:8])
        raise DataError(f"only {len(examples)} of {len(files)} images in {folder} can be used: {reasons}")
    return ImageFolder(tuple(examples), tuple(skipped))


def image_views(
    image: Image.Image, resolution: int, count: int = 1, *, random_crop: bool = False, flip: bool = False, seed: int = 0
) -> Tensor:
    """`count` views of one image as the autoencoder takes them: (count, 3, resolution, resolution) in -1 .. 1.

    The shorter side is resized to `resolution`, then a square is cut: from the centre, or at random. With `flip` every
    second view is mirrored.
    """
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    draw = torch.Generator().manual_seed(seed)
    views = []
    for index in range(count):
        place = torch.rand(2, generator=draw).tolist() if random_crop else (0.5, 0.5)
        left, top = (round((side - resolution) * at) for side, at in zip(size, place, strict=True))
        view = image.crop((left, top, left + resolution, top + resolution))
        views.append(ImageOps.mirror(view) if flip and index % 2 else view)
    pixels = torch.from_numpy(np.stack([np.asarray(view) for view in views]))  # (count, height, width, 3)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

"""Images and captions from a folder: found, read, judged, and cut to training size. Pillow and torch only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_NOT_IMAGES = {".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".md", ".csv", ".npz", ".safetensors"}


class DataError(ValueError):
    """The user's images cannot be trained on; the message says which and why."""


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


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts `2.png` before `10.png`, on every platform alike."""
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def find_files(folder: Path) -> list[Path]:
    """Files of `folder` that may be images, in natural order; subfolders and hidden files are left alone."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images")
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted((p for p in files if p.suffix.lower() not in _NOT_IMAGES), key=natural_key)


def read_image(path: Path) -> Image.Image:
    """The picture as a person sees it, in RGB: EXIF orientation applied, transparency laid on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I") or image.mode == "F":  # 16- and 32-bit greyscale: convert("RGB") would clip at 255
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def caption_of(path: Path, default: str) -> str:
    """The text file beside the image (`dog.jpg`, `dog.txt`), else `default`."""
    text = path.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
    return " ".join(caption.split()) or default


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

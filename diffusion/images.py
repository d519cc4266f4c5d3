"""Pictures and captions in a folder: found, and read as a person sees them. Pillow and numpy only."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..core.errors import DataError

_NOT_IMAGES = {".txt", ".caption", ".json", ".jsonl", ".yaml", ".yml", ".md", ".csv", ".npz", ".safetensors"}


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
    """The picture in a file, `as_seen`."""
    with Image.open(path) as file:
        return as_seen(file)


def as_seen(file: Image.Image) -> Image.Image:
    """An opened picture as a person sees it, in RGB: EXIF orientation applied, transparency laid on white."""
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

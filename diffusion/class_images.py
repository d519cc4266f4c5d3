"""Images of the class, for prior preservation: what the pipeline drew of it before it knew the subject.

They depend on model, prompt and seed alone, so runs share them: image i is always drawn from seed + i, and a larger
count only adds images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.atomic import atomic
from ..core.errors import DataError
from ..core.files import write_text
from ..core.runs.events import Progress
from .config import DreamBoothConfig
from .images import find_files
from .sample import generate_each

_RECIPE = "class_images.json"


def class_recipe(config: DreamBoothConfig, resolution: int, guidance_scale: float) -> dict[str, Any]:
    """Everything that decides what the class images look like."""
    return {
        "model": config.model,
        "revision": config.revision,
        "prompt": config.class_prompt,
        "seed": config.seed,
        "resolution": resolution,
        "steps": config.sample_steps,
        "guidance_scale": guidance_scale,
    }


def class_folder(config: DreamBoothConfig, recipe: dict[str, Any]) -> Path:
    """`class_data_dir`, else a folder beside the run that is named for the recipe."""
    if config.class_data_dir is not None:
        return Path(config.class_data_dir)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
    words = re.sub(r"\W+", "-", recipe["prompt"].lower()).strip("-")[:40]
    return Path(config.output_dir).absolute().parent / "class_images" / f"{words}-{digest}"


def missing_class_images(folder: Path, recipe: dict[str, Any], count: int) -> list[int]:
    """Numbers of the images that `folder` lacks to hold `count`. Images that the user put there count too."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(folder, recipe)
    own = sum(not path.name.startswith("class-") for path in find_files(folder))
    return [index for index in range(count - own) if not _path(folder, recipe, index).exists()]


def draw_class_images(
    pipe: Any, folder: Path, recipe: dict[str, Any], missing: Sequence[int], batch_size: int
) -> Iterator[Progress]:
    """Draw the images numbered `missing`. The pipeline must be on its device and without adapters.

    Every image appears whole or not at all, so an interrupted run goes on where it was.
    """
    images = generate_each(
        pipe,
        [(recipe["prompt"], recipe["seed"] + index) for index in missing],
        steps=recipe["steps"],
        guidance_scale=recipe["guidance_scale"],
        size=recipe["resolution"],
        batch_size=batch_size,
    )
    for done, (index, image) in enumerate(zip(missing, images, strict=True), 1):
        with atomic(_path(folder, recipe, index)) as path:
            image.save(path, "PNG")
        yield Progress("class images", done, len(missing))


def _path(folder: Path, recipe: dict[str, Any], index: int) -> Path:
    return folder / f"class-{recipe['seed']}-{index:05d}.png"


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Images of another model or prompt in the same folder would silently teach another class."""
    path = folder / _RECIPE
    if not path.exists():
        write_text(path, json.dumps(recipe, indent=2))
        return
    before = json.loads(path.read_text())
    differing = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in recipe.items() if before.get(k) != v]
    if differing:
        raise DataError(
            f"class_data_dir={folder} holds class images of another recipe ({'; '.join(differing)}); "
            "name another folder, or none to get one that fits"
        )

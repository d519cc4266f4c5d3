"""Adapters on the disk: what they are made of, and how one gets into the library."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.atomic import atomic_folder
from .errors import StudioError
from .workspace import Workspace, new_id, write_json

FILES = ("unet", "text_encoder", "text_encoder_2", "transformer", "pytorch_lora_weights.safetensors")
"""What an adapter is made of in a run's directory or a checkpoint, which hold other things too."""
PREVIEW = "preview.png"
CARD = "card.json"


def files(folder: Path) -> Iterator[Path]:
    """The adapter's own files and folders within `folder`."""
    return (folder / name for name in FILES if (folder / name).exists())


def shelve(ws: Workspace, user: str, source: Path, card: dict[str, Any], preview: Path | None = None) -> str:
    """Copy an adapter into the user's library; its id there. It appears whole or not at all.

    Arguments:
        card: what `library` shows of it: name, method, rank, base, trigger, recipe, source; times and tags are added.

    Raises:
        StudioError: `source` holds no adapter, or the name is empty.
    """
    found = list(files(source))
    if not found:
        raise StudioError("There is no finished adapter here yet. Wait for the first checkpoint, then try again.")
    if not card.get("name", "").strip():
        raise StudioError("The adapter needs a name. Type one, then save again.")
    identifier = new_id()
    with atomic_folder(ws.adapter(user, identifier)) as folder:
        for path in found:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)
        if preview is not None and preview.is_file():
            shutil.copy2(preview, folder / PREVIEW)
        write_json(folder / CARD, {"created": time.time(), "tags": [], **card, "name": card["name"].strip()[:80]})
    return identifier

"""Adapters for other programs: a job that converts, and then a file to download."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.atomic import atomic
from .. import safety
from ..errors import NotFound, StudioError
from ..jobs import store
from ..workspace import Workspace
from . import library

TITLES = {
    "diffusers": "diffusers (load_lora_weights)",
    "kohya": "kohya (A1111, Forge, LyCORIS, ComfyUI)",
    "comfy": "ComfyUI",
    "peft": "PEFT (a zip with a folder for each part of the model)",
}
DTYPES = ("", "float32", "float16", "bfloat16")
_HELD = {
    "diffusers": {"LoRA", "DoRA"},
    "peft": {"LoRA", "DoRA", "LoHa", "LoKr", "IA3", "OFT", "BOFT"},
}
"""Dialect -> the methods that it can express; others, all that have a name."""


@dataclass(frozen=True)
class Choice:
    """A format, and whether an adapter can go there as it is."""

    to: str
    title: str
    reason: str = ""
    """Why not, with the way out; empty if it can."""


def choices(ws: Workspace, user: str, adapter: object) -> list[Choice]:
    """Every format, and why an adapter cannot have it, from its inspection report."""
    methods = {part["method"] for part in library.report(ws, user, adapter)["parts"]}
    return [Choice(to, title, _why_not(methods, to)) for to, title in TITLES.items()]


def _why_not(methods: set[str], to: str) -> str:
    strange = sorted(methods - _HELD[to]) if to in _HELD else []
    return f"{', '.join(strange)} does not exist there: turn it into LoRA with a rank" if strange else ""


def start(ws: Workspace, user: str, adapter: object, to: str, *, dtype: str = "", rank: int | None = None) -> str:
    """Begin to convert; the job's id.

    Arguments:
        dtype: what numbers are stored in, as `DTYPES`; empty keeps them.
        rank: turn every layer into the nearest LoRA of at most this rank; None keeps the method.

    Raises:
        StudioError: an unknown format, or one that cannot express the adapter.
    """
    found = library.get(ws, user, adapter)
    if to not in list(TITLES) or dtype not in DTYPES:
        raise StudioError(f"Choose a format out of {', '.join(TITLES)}, and numbers out of {', '.join(DTYPES[1:])}.")
    if rank is not None and (type(rank) is not int or not 1 <= rank <= 1024):
        raise StudioError("The rank must be a whole number from 1 to 1024.")
    reason = "" if rank is not None else next(c.reason for c in choices(ws, user, adapter) if c.to == to)
    if reason:
        raise StudioError(f"{found.name} cannot be exported to {to}: {reason}.")
    file = f"{safety.slug(found.name)}{'' if to == 'peft' else f'-{to}.safetensors'}"
    path = str(found.path.relative_to(ws.root))
    arguments = {"path": path, "file": file, "options": dict(_options(found, to, dtype, rank))}
    return store.submit(ws, user, "convert", arguments)


def _options(found: library.Adapter, to: str, dtype: str, rank: int | None) -> Iterator[tuple[str, Any]]:
    """Fields of `ConvertConfig`."""
    yield "to", to
    if dtype:
        yield "dtype", dtype
    if rank is not None:
        yield from (("method", "lora"), ("rank", rank))
    if found.base == "embedded":  # of a file's own word for its model nothing else is believed
        yield "base", found.base


def result(ws: Workspace, user: str, job: object) -> Path:
    """The file to download, in the job's folder; a PEFT directory becomes a zip archive.

    Raises:
        NotFound: the job is not, or not successfully, done.
        PermissionDenied: it is somebody else's.
    """
    found = store.owned(ws, user, job, position=False)
    made = found.out / str(found.arguments.get("file", ""))
    if found.kind != "convert" or found.state != "done" or not made.exists():
        raise NotFound(found.message or "The export is not finished yet.")
    return _zipped(made) if made.is_dir() else made


def _zipped(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    if not target.exists():
        with atomic(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder.parent))
    return target

"""Deleted things: moved aside whole, and back again. Kinds are "datasets" and "adapters"."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from ..errors import NotFound
from ..workspace import Workspace, checked_id


def throw_away(ws: Workspace, user: str, kind: str, thing: object) -> None:
    """Move a thing to the trash.

    Raises:
        NotFound: the user has no such thing.
    """
    _move(_home(ws, user, kind, thing), ws.trash(user, kind) / checked_id(thing))


def put_back(ws: Workspace, user: str, kind: str, thing: object) -> None:
    """Undo `throw_away`.

    Raises:
        NotFound: it is not, or no longer, in the trash.
    """
    _move(ws.trash(user, kind) / checked_id(thing), _home(ws, user, kind, thing))


def thrown_away(ws: Workspace, user: str, kind: str) -> list[str]:
    """Ids in the trash, the last deleted first."""
    folder = ws.trash(user, kind)
    found = list(folder.iterdir()) if folder.is_dir() else []
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def empty(ws: Workspace, user: str, kind: str, older_than: float = 0.0) -> int:
    """Delete for good what lies in the trash for more than `older_than` seconds; returns how many things."""
    folder, limit = ws.trash(user, kind), time.time() - older_than
    old = [path for name in thrown_away(ws, user, kind) if (path := folder / name).stat().st_mtime <= limit]
    for path in old:
        shutil.rmtree(path)
    return len(old)


def _home(ws: Workspace, user: str, kind: str, thing: object) -> Path:
    return (ws.dataset if kind == "datasets" else ws.adapter)(user, thing)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except FileNotFoundError:
        raise NotFound("This is not there any more. Reload the page to see what is.") from None
    os.utime(target)  # when it was deleted

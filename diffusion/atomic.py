"""Folders that appear whole or not at all, also when the process is killed or the power fails.

For single files there is `core.files.atomic`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".incomplete-"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded folder; it takes the place of `path` when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inner in [*temporary.rglob("*"), temporary]:
            _sync(inner)
        _replace_folder(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """`os.replace` cannot put a folder in the place of a full one, so the old one steps aside first."""
    if path.exists():
        old = path.with_name(f"{TEMPORARY}{os.getpid()}-old-{path.name}")
        os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old)
    else:
        os.replace(new, path)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`."""
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) * path.is_dir()
    try:
        handle = os.open(path, flags)
    except PermissionError:  # folders cannot be opened on Windows, nor need they be
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Files and folders that appear whole or not at all, also when the process is killed or the power fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, get_native_id

TEMPORARY = ".incomplete-"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well, removed when it does not."""
    temporary = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes for the owner's eyes only
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill the yielded folder; it takes the place of `path` when the block ends well."""
    temporary = _beside(path)
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


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


_ASKING = Lock()


def _umask() -> int:
    """It can only be read by setting it: one thread at a time, and never to something that lets others in."""
    with _ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def _beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{get_native_id()}-{path.name}")


def _replace_folder(new: Path, path: Path) -> None:
    """`os.replace` cannot put a folder in the place of a full one, so the old one steps aside first."""
    if path.exists():
        old = path.with_name(f"{TEMPORARY}{os.getpid()}-{get_native_id()}-old-{path.name}")
        os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old)
    else:
        os.replace(new, path)


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

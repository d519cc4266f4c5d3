"""Packages whose public names load on first use (PEP 562), so that importing one costs next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def face(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, from the submodule where each public name lives.

    A submodule that is public itself is its own home.
    """
    names = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = import_module(f".{homes[name]}", package)
        names[name] = home if name == homes[name] else getattr(home, name)  # the next look-up does not come here
        return names[name]

    return get, lambda: sorted({*names, *homes})

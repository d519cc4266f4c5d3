"""The ways to combine adapters. A function registered in a file of this folder is one: nothing else lists them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from .registry import COMBINATIONS, Combination


@cache
def combination_types() -> dict[str, Combination]:
    """Every combination by its name, found by importing this folder."""
    for info in iter_modules(__path__):
        import_module(f".{info.name}", __name__)
    return COMBINATIONS

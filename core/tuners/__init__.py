"""One file a method. A config class defined in a file of this folder is a method: nothing else lists them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from ..config import PeftConfig, PeftType


@cache
def registry() -> dict[PeftType, type[PeftConfig]]:
    """Config class of every method, found by scanning this folder."""
    found: dict[PeftType, type[PeftConfig]] = {}
    for info in iter_modules(__path__):
        for value in vars(import_module(f".{info.name}", __name__)).values():
            if isinstance(value, type) and issubclass(value, PeftConfig) and "adapter_class" in vars(value):
                found[PeftType(value.peft_type)] = value
    return found

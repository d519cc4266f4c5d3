"""How LoRA's factors start, beyond Kaiming and Gaussian noise: one file an initialisation, found by its name.

`init_lora_weights="pissa"` finds the function that is registered so. It gets the adapter and the base weight, and
returns factors. Where their product is not zero and yet training shall start from the base model, the product is
subtracted *by the adapter*, as further frozen factors: the base weight stays as it is, bit for bit, other adapters
and `disable_adapter` see the true base model, and several such adapters share a model.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from .registry import INITIALISATIONS, Initialisation, Start

__all__ = ["Initialisation", "Start", "find_initialisation", "initialisations"]


@cache
def initialisations() -> dict[str, Initialisation]:
    """All of them by name, found by scanning this folder."""
    for info in iter_modules(__path__):
        import_module(f".{info.name}", __name__)
    return INITIALISATIONS


def find_initialisation(name: Any) -> Initialisation | None:
    """The initialisation that a value of `init_lora_weights` names, or None for the plain ones.

    Raises:
        ValueError: nothing is called so.
    """
    if name in (True, False, "gaussian"):
        return None
    known = initialisations()
    found = next((i for i in known.values() if isinstance(name, str) and i.pattern.fullmatch(name)), None)
    if found is None:
        raise ValueError(
            f"init_lora_weights={name!r} is unknown; expected True, False, 'gaussian', {', '.join(map(repr, known))}"
        )
    return found

"""The dialects: one entry each, registered by its own module. No tensors here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .canonical import Canonical, Header
    from .names import Names

DIALECTS: dict[str, Dialect] = {}


@dataclass(frozen=True)
class Dialect:
    """A way to lay an adapter out on disk."""

    name: str
    """As in `--to`."""
    title: str
    """For people."""
    keys: re.Pattern[str]
    """Matches the keys that speak for this dialect; the one with most such keys is it."""
    write: Callable[[Canonical, Names], tuple[dict[str, Tensor], dict[str, str]]] | None = None
    """Canonical -> tensors and metadata of a file, or None for a dialect that is only read.

    Raises ValueError for what the dialect cannot express, with the reason and the way out.
    """


def register(dialect: Dialect) -> Dialect:
    """Add a dialect to the table."""
    DIALECTS[dialect.name] = dialect
    return dialect


def detect(header: Header) -> Dialect:
    """The dialect of a file, from its keys.

    Raises:
        ValueError: it is none of them; names the first keys.
    """
    counts: Mapping[str, int] = {
        name: sum(1 for key in header.shapes if dialect.keys.search(key)) for name, dialect in DIALECTS.items()
    }
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        shown = ", ".join(sorted(header.shapes)[:4]) or "no tensors at all"
        raise ValueError(f"no adapter of a known dialect ({', '.join(DIALECTS)}): it holds {shown}")
    return DIALECTS[best]

"""An adapter and its strength, as people write them: `PATH` or `PATH=WEIGHT`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple


class Weighted(NamedTuple):
    """An adapter to load: a unique `name`, where it lies and how strongly it acts (1.0 is as trained)."""

    name: str
    path: str
    weight: float


def parse_weighted(texts: Iterable[str]) -> list[Weighted]:
    """`["runs/bear", "runs/ink=0.7"]` -> bear at 1.0 and ink at 0.7; equal names get a number."""
    parsed: list[Weighted] = []
    for text in texts:
        path, weight = _split(text)
        stem = PurePath(path).name.removesuffix(".safetensors").replace(".", "_") or "adapter"
        taken = sum(name == stem or name.rpartition("-")[0] == stem for name, *_ in parsed)
        parsed.append(Weighted(f"{stem}-{taken + 1}" if taken else stem, path, weight))
    return parsed


def _split(text: str) -> tuple[str, float]:
    path, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0  # the path itself has an equals sign

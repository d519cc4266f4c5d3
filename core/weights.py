"""How much of an adapter each layer takes: one number, or a number for each block of the model.

Merging and combining take the same weights, with the same meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from numbers import Real
from typing import Any

from .targets import near

Weight = float | Mapping[str, float]
"""One weight for all layers, or weights by pattern (see `resolve`)."""


def resolve(weight: Weight, paths: Iterable[str]) -> dict[str, float]:
    """The weight of every path.

    A key of a mapping is the path of one layer, or a regex for one or more whole parts of a dotted path, wherever they
    stand: "up_blocks" and "up_blocks.1" name blocks, "attn2" and "to_[qk]" layers throughout the model. A path of its
    own goes first; then the first key that matches decides, as in PEFT's `rank_pattern`. What no key matches weighs 1,
    as trained, so put ".*" last to give the rest another weight.

    Example:
        >>> resolve({"up_blocks": 0.5, ".*": 0}, ["down_blocks.0.to_q", "up_blocks.1.to_q"])
        {'down_blocks.0.to_q': 0.0, 'up_blocks.1.to_q': 0.5}

    Raises:
        ValueError: a weight that is no finite number, a key that is no regex, one that matches nothing, or one that
            decides nothing because earlier keys match all that it would.
    """
    if not isinstance(weight, Mapping):
        return dict.fromkeys(paths, _number(weight, "the weight"))
    paths = list(paths)
    numbers = {key: _number(value, f"the weight of {key!r}") for key, value in weight.items()}
    patterns = {key: _compile(key) for key in numbers.keys() - set(paths)}
    in_order = [(key, patterns[key]) for key in numbers if key in patterns]
    deciding = {path: path if path in numbers else _first(in_order, path) for path in paths}
    for key in numbers.keys() - deciding.values():
        _refuse(key, patterns[key], deciding)
    return {path: 1.0 if key is None else numbers[key] for path, key in deciding.items()}


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{what} is {value!r}: expected a finite number")
    return float(value)


def _compile(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})(\..*)?")
    except re.error as error:
        raise ValueError(f"{key!r} is neither the path of a layer nor a regex for one: {error}") from error


def _first(patterns: list[tuple[str, re.Pattern[str]]], path: str) -> str | None:
    return next((key for key, pattern in patterns if pattern.fullmatch(path)), None)


def _refuse(key: str, pattern: re.Pattern[str], deciding: Mapping[str, str | None]) -> None:
    earlier = sorted({str(first) for path, first in deciding.items() if pattern.fullmatch(path)})
    if earlier:
        raise ValueError(f"the weight of {key!r} decides nothing: {earlier} before it match all its layers")
    blocks = [block for path in deciding for block in _blocks(path)]
    raise ValueError(f"the weight of {key!r} matches none of the {len(deciding)} layers{near([key], blocks)}")


def _blocks(path: str) -> Iterator[str]:
    """The path and everything that contains it: "a.b.c", "a.b", "a"."""
    while path:
        yield path
        path = path.rpartition(".")[0]

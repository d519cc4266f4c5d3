"""Values that come from files, held against what a config's annotations promise the code that uses them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .config import PeftConfig, compile_pattern


def misfits(config: PeftConfig) -> Iterator[str]:
    """Options with a value of a type that they cannot have, and patterns that are no regular expressions."""
    hints = _hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if not fits(value, hints[field.name]):
            yield f"{field.name}={value!r} is no {field.type}"
        elif field.name.endswith("_modules") and isinstance(value, str):
            yield from _no_regex(field.name, value)
        elif field.name.endswith("_pattern") and isinstance(value, dict):
            for key in value:
                yield from _no_regex(field.name, key)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. Whole numbers are floats too; 0, 1 and None may stand for flags.

    >>> fits(["q", "v"], list[str] | str | None), fits([1], list[str] | None), fits(True, int)
    (True, False, False)
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (list, set):
        return isinstance(value, (list, set, tuple)) and all(fits(item, arguments[0]) for item in value)
    if hint is bool:
        return value in (True, False, None)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint)
    return isinstance(value, NoneType if hint is None else hint)


@cache
def _hints(config_class: type[PeftConfig]) -> dict[str, Any]:
    return get_type_hints(
        config_class, localns={"Adapter": Any}
    )  # of a class variable, which torch would be needed for


def _no_regex(name: str, pattern: str) -> Iterator[str]:
    try:
        compile_pattern(pattern)
    except re.error as error:
        yield f"{name}: {pattern!r} is no regular expression: {error}"

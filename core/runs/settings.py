"""Config dataclasses as plain data and as YAML: what `--print-config` shows and a run directory keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work; one line a problem."""


def plain(value: Any) -> Any:
    """`value` in YAML's and JSON's own types: dataclasses become dicts, paths strings, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.value if isinstance(value, Enum) else value


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """The config of class `cls` that `plain` gave as `values`; what they lack keeps its default.

    Raises:
        ConfigError: a name that is no field of it.
    """
    kinds = get_type_hints(cls)
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise ConfigError(f"{cls.__name__} has no {', '.join(unknown)}; it has {', '.join(kinds)}")
    return cls(**{name: _typed(kinds[name], value) for name, value in values.items()})


def _typed(kind: Any, value: Any) -> Any:
    """A plain value as the type that a field is declared with; dicts and numbers are the same in both."""
    if value is None:
        return None
    if get_origin(kind) is UnionType:
        return _typed(next(choice for choice in get_args(kind) if choice is not NoneType), value)
    if is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else from_plain(kind, value)
    if kind is Path:
        return Path(value)
    return tuple(value) if get_origin(kind) is tuple else value


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML, in the order of its fields; `veneer COMMAND --config` reads it back."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)

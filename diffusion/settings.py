"""Config dataclasses as plain data and as YAML: what `--print-config` shows and a run directory keeps."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


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


def to_yaml(config: Any) -> str:
    """A config dataclass as YAML, in the order of its fields; `veneer COMMAND --config` reads it back."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)

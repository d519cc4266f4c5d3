"""The sentences under a config's fields. Python forgets them; the source has them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from textwrap import dedent


@cache
def field_docs(cls: type) -> dict[str, str]:
    """What a dataclass, or a class that it inherits from, says below each of its fields."""
    return {name: doc for base in reversed(cls.__mro__) for name, doc in _own(base)}


def _own(cls: type) -> Iterator[tuple[str, str]]:
    if "__dataclass_fields__" not in vars(cls):
        return
    (definition,) = ast.parse(dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    name = ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            yield name, " ".join(str(node.value.value).split())

"""Every method that a training may use, with its own options, read from the sources of `core/tuners` without running
them: their modules import torch, which the web process does not. Tests hold this against the registry."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...core import config as core_config
from ...core.config import PeftConfig

TUNERS = Path(core_config.__file__).parent / "tuners"
_TYPES = {"int": "int", "float": "float", "bool": "bool"}


@dataclass(frozen=True)
class Option:
    """A field of a method's own config that a form can ask for."""

    name: str
    type: str
    """As `recipes.Field.type`."""
    default: Any
    help: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    key: str
    """As settings have it: `lora`."""
    about: str
    """The first line of its file: name, paper and formula."""
    fields: frozenset[str]
    """All that its config holds, the common fields too."""
    options: tuple[Option, ...]


@cache
def methods() -> dict[str, Method]:
    """Every method that changes layers, by key; those that learn prompts change none."""
    classes: dict[str, ast.ClassDef] = {}
    registered: dict[str, str] = {}
    for path in sorted(TUNERS.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        about = (ast.get_docstring(tree) or "").partition("\n")[0]
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node
                registered |= dict.fromkeys(_registers(node), about)
    registered = {name: about for name, about in registered.items() if not _learns_prompts(classes[name])}
    found = (_method(classes, name, about) for name, about in registered.items())
    return {method.key: method for method in found if "target_modules" in method.fields}


def _registers(node: ast.ClassDef) -> Iterator[str]:
    """The config that an adapter's class is registered for: `@method(LoraConfig)`."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "method":
            yield from (argument.id for argument in call.args if isinstance(argument, ast.Name))


def _learns_prompts(node: ast.ClassDef) -> bool:
    """Whether a config says `prompts: ClassVar[bool] = True`."""
    return any(isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "prompts" for n in node.body)


def _method(classes: dict[str, ast.ClassDef], name: str, about: str) -> Method:
    own = dict(_fields(classes, name))
    kind = own["peft_type"][0]
    assert isinstance(kind.value, ast.Attribute)  # PeftType.LORA
    known = own.keys() | {field.name for base in _bases(classes, name) for field in dataclasses.fields(base)}
    options = tuple(option for field, told in own.items() if (option := _option(field, *told)) is not None)
    return Method(kind.value.attr.lower(), about, frozenset(known), options)


def _bases(classes: dict[str, ast.ClassDef], name: str) -> Iterator[type]:
    """The classes of `core.config` that a config inherits from."""
    for base in (base.id for base in classes[name].bases if isinstance(base, ast.Name)):
        if base in classes:
            yield from _bases(classes, base)
        elif isinstance(found := getattr(core_config, base, None), type) and issubclass(found, PeftConfig):
            yield found


def _fields(classes: dict[str, ast.ClassDef], name: str) -> Iterator[tuple[str, tuple[ast.AnnAssign, str]]]:
    """Field -> its declaration and sentence, inherited ones of the tuners' own bases first."""
    for base in (base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes):
        yield from _fields(classes, base)
    body = classes[name].body
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _of_the_class(node):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            yield node.target.id, (node, " ".join(str(after.value.value).split()) if said else "")  # type: ignore


def _of_the_class(node: ast.AnnAssign) -> bool:
    return ast.unparse(node.annotation).startswith("ClassVar")


def _option(name: str, declared: ast.AnnAssign, help_: str) -> Option | None:
    """A field as a form's; None for what a form cannot ask for or nobody trains with."""
    kinds = [kind for kind in ast.unparse(declared.annotation).split(" | ") if kind != "None"]
    if len(kinds) != 1 or name == "peft_type" or "for tests" in help_ or "Kept for PEFT" in help_:
        return None
    try:
        default = ast.literal_eval(declared.value) if declared.value else None
    except ValueError:
        return None
    if kinds[0].startswith("Literal["):
        values = ast.literal_eval(f"[{kinds[0][len('Literal[') : -1]}]")
        every_text = all(isinstance(value, str) for value in values)
        return Option(name, "choice", default, help_, tuple(values)) if every_text else None
    return Option(name, _TYPES[kinds[0]], default, help_) if kinds[0] in _TYPES else None

"""Where the verbs become methods: of one model (`attach`), or of all of transformers' (`install`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..core.files import read_config
from . import adapters

M = TypeVar("M", bound=nn.Module)

_replaced: list[tuple[type, str, Any]] = []
"""What `install` put other attributes over, in order: class, name, and what its own `__dict__` had (or None)."""


class Method:
    """A verb of one model; unlike a bound method, it goes through `copy` and `pickle` with the model."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self.name](self.model, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.name} of {type(self.model).__name__}, by veneer>"


def attach(model: M) -> M:
    """Give one transformers model the methods of its adapter integration, for every method and without `peft`.

    The model is returned. Beside transformers' names it has `merge_adapter`, `unmerge_adapter`, `merge_and_unload`,
    `unload`, `add_weighted_adapter`, `disable_adapter` and `set_requires_grad`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from veneer import LoraConfig, text
        >>> shape = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model = text.attach(LlamaForCausalLM(shape))
        >>> model.add_adapter(LoraConfig(r=2), "english")
        >>> model.active_adapters()
        ['english']
    """
    for name in _METHODS:
        vars(model)[name] = Method(model, name)
    return model


def install() -> None:
    """Give every transformers model those methods, and let `from_pretrained` open adapter directories and hub ids.

    It replaces attributes of `PreTrainedModel` and of the auto classes in this process until `uninstall`, and does
    nothing the second time.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto

    if _replaced:
        return
    for name, method in _METHODS.items():
        _replace(PreTrainedModel, name, method)
    autos = [c for c in vars(modeling_auto).values() if isinstance(c, type) and "from_pretrained" in vars(c)]
    for owner in (PreTrainedModel, *autos):  # every auto class has a copy of its own
        _replace(owner, "from_pretrained", _opening_adapters(vars(owner)["from_pretrained"].__func__))


def uninstall() -> None:
    """Undo `install`. Models that have adapters keep them, and may be given the methods with `attach`."""
    while _replaced:
        owner, name, before = _replaced.pop()
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _replace(owner: type, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, value)


def _opening_adapters(original: Callable[..., Any]) -> classmethod:
    """`from_pretrained` that, given an adapter, loads its base model as before and the adapter on it."""
    from .load import load_on_base, split

    @wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        where, options = split(kwargs)
        where |= kwargs.get("adapter_kwargs") or {}
        if not _is_adapter(pretrained_model_name_or_path, where):
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        options.pop("adapter_kwargs", None)
        name, trainable = options.pop("adapter_name", "default"), options.pop("is_trainable", False)
        config = read_config(pretrained_model_name_or_path, **where)

        def load(base: str, **rest: Any) -> Any:
            return original(cls, base, *args, **rest)

        return load_on_base(load, pretrained_model_name_or_path, config, where, name, trainable, options)

    return classmethod(from_pretrained)


def _is_adapter(source: Any, where: dict[str, Any]) -> bool:
    from transformers.utils import find_adapter_config_file

    if source is None or Path(source).is_file():
        return False
    return find_adapter_config_file(str(source), **where) is not None


def _or_plain(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that a model without adapters does as transformers has it."""

    @wraps(verb)
    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if adapters.has_adapters(model):
            return verb(model, *args, **kwargs)
        return _original(type(model), verb.__name__)(model, *args, **kwargs)

    return method


def _original(kind: type, name: str) -> Callable[..., Any]:
    """What a class has of that name without `install`."""
    before = {owner: value for owner, replaced, value in _replaced if replaced == name}
    return next(found for c in kind.mro() if (found := before.get(c) if c in before else vars(c).get(name)) is not None)


_METHODS: dict[str, Callable[..., Any]] = {
    **adapters.VERBS,
    "save_pretrained": _or_plain(adapters.save_pretrained),
    "push_to_hub": _or_plain(adapters.push_to_hub),
}

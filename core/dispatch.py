"""Weights that accelerate keeps in memory or on disk until their layer runs (`device_map`).

The module then holds placeholders on the meta device, and a hook brings the values. They are looked up by what the
hook is like, so that nothing is imported.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def offloading(module: nn.Module) -> Any:
    """The hook that brings the module's weights, or None."""
    hook = module.__dict__.get("_hf_hook")
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


def execution_device(hook: Any) -> torch.device:
    """Where the layer runs."""
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def fetch(module: nn.Module, hook: Any) -> dict[str, nn.Parameter | None]:
    """The values of a module's own parameters, on the device where it runs."""
    device = execution_device(hook)
    return {
        name: None if p is None else nn.Parameter(hook.weights_map[name].to(device), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }


def put(module: nn.Module, hook: Any, name: str, value: nn.Parameter | None) -> None:
    """Have the hook bring `value` from now on. It waits in memory, also where the others are on disk."""
    module._parameters[name] = None if value is None else nn.Parameter(value.to("meta"), value.requires_grad)
    if value is not None:
        _write(hook.weights_map, name, value.detach().to("cpu"))


def _write(weights: Any, name: str, value: Tensor) -> None:
    if isinstance(weights, MutableMapping):
        weights[name] = value
    elif hasattr(weights, "prefix"):  # the part of one module
        _write(weights.dataset, weights.prefix + name, value)
    else:  # in memory first, then on disk
        weights.state_dict[name] = value


def whole_copy(module: nn.Module) -> nn.Module:
    """A copy with its weights in it, and without hooks, which would copy the weights of the whole model."""
    hooks = {path: hook for path, m in module.named_modules() if (hook := m.__dict__.get("_hf_hook")) is not None}
    copy = deepcopy(module, {id(hook): None for hook in hooks.values()})
    for path in hooks:
        inner = copy.get_submodule(path)
        for name in ("_hf_hook", "_old_forward", "forward"):
            inner.__dict__.pop(name, None)
        source = module.get_submodule(path)
        hook = offloading(source)
        if hook is not None:
            found = fetch(source, hook)
            inner._parameters.update(
                {n: p if p is None else nn.Parameter(p.detach().clone()) for n, p in found.items()}
            )
    return copy

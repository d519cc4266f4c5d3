"""What a model's adapters are doing, and the layer classes that code written for PEFT asks `isinstance` about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from .adapted import AdaptedModel
from .handle import handle_of
from .layer import AdaptedLayer
from .tuners.lora import LoRA


@dataclass
class TunerLayerStatus:
    """One adapted layer; the dicts are by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """All adapted layers together; "irregular" where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted layer of a model.

    Raises:
        ValueError: the model has no adapters.
    """
    return [
        TunerLayerStatus(
            name=path,
            module_type=type(layer.base_layer).__name__,
            enabled=layer.state.enabled,
            active_adapters=layer.active_adapters,
            merged_adapters=list(layer.merged_adapters),
            requires_grad={n: _agreed(p.requires_grad for p in a.parameters()) for n, a in layer.adapters.items()},
            available_adapters=sorted(layer.adapters),
            devices={n: sorted({str(p.device) for p in a.parameters()}) for n, a in layer.adapters.items()},
        )
        for path, layer in handle_of(model).layers.items()
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters over all layers.

    Raises:
        ValueError: the model has no adapters.
    """
    handle: AdaptedModel = handle_of(model)
    parameters = list(handle.parameters())
    own = {name: list(handle.parameters_of(name)) for name in handle.configs}
    return TunerModelStatus(
        base_model_type=type(handle.model).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: str(config.peft_type) for name, config in handle.configs.items()},
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        total_params=sum(p.numel() for p in parameters),
        num_adapter_layers=len(handle.layers),
        enabled=handle.state.enabled,
        active_adapters=list(handle.state.active),
        merged_adapters=list(handle.state.merged),
        requires_grad={name: _agreed(p.requires_grad for p in found) for name, found in own.items()},
        available_adapters=sorted(handle.configs),
        devices={name: sorted({str(p.device) for p in found}) for name, found in own.items()},
    )


def _agreed(values: Any) -> Any:
    """The one value that all share, or "irregular"."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


BaseTunerLayer = AdaptedLayer


class _HasLora(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, AdaptedLayer) and any(
            isinstance(m, LoRA) for a in instance.adapters.values() for m in (a, getattr(a, "direction", None))
        )


class LoraLayer(metaclass=_HasLora):
    """For `isinstance`: an adapted layer that has a LoRA adapter."""


class _HasCopy(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, AdaptedLayer) and any(a.whole is not None for a in instance.adapters.values())


class ModulesToSaveWrapper(metaclass=_HasCopy):
    """For `isinstance`: a module that some adapter trains whole."""

"""From a run's options to adapters on its pipeline, and from adapters to what a file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core import AdaptedModel, PeftConfig
from ..core.runs.adapters import method_class, peft_config
from ..core.runs.random_state import derived_seed
from ..core.runs.settings import ConfigError
from ..core.runs.trainer import ADAPTER
from .config import AdapterOptions
from .families import Component, Family

Adapters = dict[str, tuple[PeftConfig, dict[str, Tensor]]]
"""Component -> (config, tensors by module path): what every file dialect reads and writes."""


def targets_of(name: str, options: AdapterOptions, component: Component) -> list[str]:
    """Name suffixes of the layers that get an adapter."""
    names = options.targets or component.attention
    for field, asked, more in (
        ("feed_forward", options.feed_forward, component.feed_forward),
        ("conv", options.conv, component.convolution),
    ):
        if asked and not more:
            raise ConfigError(f"{name}.{field}: the {name} has no such layers")
        names += more if asked else ()
    return list(dict.fromkeys(names))


def component_config(name: str, options: AdapterOptions, component: Component, model: str, steps: int) -> PeftConfig:
    """The core's config for `options`; `model` is remembered as the base."""
    if method_class(name, options.method).prompts:
        raise ConfigError(
            f"{name}.method={options.method} learns tokens before a language model's input; a pipeline has no place "
            "for them. Choose a method that adapts layers, such as lora"
        )
    targets = targets_of(name, options, component)
    return peft_config(
        name,
        replace(options, targets=tuple(targets)),
        steps,
        base_model_name_or_path=model,
        feedforward_modules=[target for target in targets if target in component.feed_forward],
    )


def attach(
    pipe: Any, family: Family, wanted: Mapping[str, AdapterOptions], model: str, seed: int, steps: int
) -> dict[str, AdaptedModel]:
    """Freeze the pipeline's components and give those in `wanted` an adapter to train.

    Refuses to start with nothing to train: targets or patterns that match no layer, or a component without a trainable
    parameter.
    """
    adapted = {}
    for name, options in wanted.items():
        if name not in family.components:
            raise ConfigError(f"{family.name} has no component {name}; it has {', '.join(family.components)}")
        adapted[name] = AdaptedModel(getattr(pipe, name))
        config = component_config(name, options, family.components[name], model, steps)
        with torch.random.fork_rng([]):
            torch.manual_seed(derived_seed(seed, "adapter", name))
            adapted[name].add(ADAPTER, config, strict=True)
        if not any(p.requires_grad and p.numel() for p in adapted[name].parameters_of(ADAPTER)):
            raise ConfigError(f"the adapter of {name} has no trainable parameter; check {name}.options")
    return adapted


def trained(adapted: Mapping[str, AdaptedModel]) -> Adapters:
    """What there is to save, on the CPU."""
    return {
        name: (model.configs[ADAPTER], {key: tensor.cpu() for key, tensor in model.tensors(ADAPTER).items()})
        for name, model in adapted.items()
    }

"""Surgery on a model: building adapters for its layers, putting wrapped layers in their place, taking them out."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, by_class
from .config import HEADS, PeftConfig, TaskType
from .errors import MergedError
from .layer import AdaptedLayer
from .prompts.layer import PromptLayer
from .quantized import quantized_sites
from .state import State
from .targets import Place, base_of, check_patterns, input_embedding, inside, near, select, select_parameters
from .ties import tied_to
from .tuners.copied import Copied
from .tuners.tokens import Tokens

HALF = (torch.float16, torch.bfloat16)
META = torch.device("meta")
Built = tuple[Place, AdaptedLayer, Adapter]


def whole_modules(
    model: nn.Module, config: PeftConfig, places: dict[str, Place], adapted: Iterable[str]
) -> list[Place]:
    """The modules that `config` trains whole.

    Raises:
        ValueError: a name matches nothing (one of a task's alternative heads is enough), or a module contains layers
            that have adapters already.
    """
    named = {n: [p for path, p in places.items() if f".{path}".endswith(f".{n}")] for n in config.modules_to_save or ()}
    missing = [n for n, found in named.items() if not found]
    heads = HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    if any(n not in heads for n in missing) or (missing and len(missing) == len(named)):
        message = f"modules_to_save={sorted(missing)} matches no module of {type(model).__name__}"
        raise ValueError(message + near(missing, places))
    whole = {p.path: p for found in named.values() for p in found}
    nested = inside(whole)
    clash = next((path for path in adapted if path not in whole and nested(path)), None)
    if clash:
        raise ValueError(f"{clash} has an adapter already, and modules_to_save would copy a module that contains it")
    return list(whole.values())


def build_adapters(
    model: nn.Module,
    config: PeftConfig,
    places: dict[str, Place],
    state: State,
    *,
    autocast: bool,
    initialise: bool,
    strict: bool,
) -> list[Built]:
    """Adapters for everything that `config` targets or trains whole, and their layers; nothing is installed yet."""
    adapted = [path for path, place in places.items() if isinstance(place.module, AdaptedLayer)]
    quantized_sites(p.module for p in places.values() if not isinstance(p.module, AdaptedLayer))  # settles them all
    built: list[Built] = []
    parameters = select_parameters(model, config, places)
    only_these = config.prompts or (parameters and not config.target_modules)
    chosen = [] if only_these else select(model, config, places)
    named = [f"{place.path}.{name}" for place, names in parameters for name in names]
    check_patterns(config, [*(place.path for place in chosen), *named], strict)
    whole = whole_modules(model, config, places, adapted)
    for place, layer in config.layers(model, places, state) if config.prompts else ():
        built.append((place, layer, _build(config, layer, place.path, autocast, initialise)))
    for place in chosen:
        layer = _layer_at(place, state)
        built.append((place, layer, _build(config, layer, place.path, autocast, initialise)))
    for place, names in parameters:
        layer = _layer_at(place, state)
        if any(place is other for other in chosen):
            raise ValueError(f"{place.path} is in target_modules, and {names} of it in target_parameters: choose one")
        built.append((place, layer, _build(config, layer, place.path, autocast, initialise, names)))
    built += _tokens(model, config, places, built, state, autocast, initialise)
    _share({place.path: adapter for place, _, adapter in built})
    _initialise([(layer, adapter) for _, layer, adapter in built], initialise)
    for place in whole:
        layer = _layer_at(place, state)
        built.append((place, layer, Copied(config, layer.site, place.path, *layer.site.place)))
    return built


def _layer_at(place: Place, state: State) -> AdaptedLayer:
    return place.module if isinstance(place.module, AdaptedLayer) else AdaptedLayer(place.module, state, place.path)


def _build(
    config: Any, layer: AdaptedLayer, path: str, autocast: bool, initialise: bool, parameters: list[str] | None = None
) -> Adapter:
    """An adapter on its layer's device: in float32 over half precision (`autocast`), else in the layer's dtype."""
    place = _place_of(layer, autocast, initialise)
    other = next((name for name, a in layer.adapters.items() if a.by_name != (parameters is not None)), None)
    if other is not None:
        raise ValueError(
            f"{path} has adapter {other!r} already, and one of both is by target_parameters: they cannot share a module"
        )
    if parameters is not None:
        return config.build_parameters(layer.site, path, parameters, *place)
    return config.build(layer.site, path, *place)


def _place_of(layer: AdaptedLayer, autocast: bool, initialise: bool) -> tuple[torch.device, torch.dtype]:
    device, dtype = layer.site.place
    if not dtype.is_floating_point or (autocast and dtype in HALF):
        dtype = torch.float32
    return device if initialise else META, dtype


def _tokens(
    model: nn.Module,
    config: PeftConfig,
    places: dict[str, Place],
    built: list[Built],
    state: State,
    autocast: bool,
    initialise: bool,
) -> list[Built]:
    """Adapters for `trainable_token_indices`, and for the modules that are tied to an embedding whose tokens are
    trained.

    Raises:
        ValueError: a name that matches nothing, or a layer that the adapter changes otherwise too.
    """
    wanted = getattr(config, "trainable_token_indices", None) or {}
    if isinstance(wanted, list):
        wanted = {input_embedding(model, places): wanted}
    whole = inside(config.modules_to_save)
    mine = {place.path: adapter for place, _, adapter in built}
    found: list[Built] = []

    def add(place: Place, tokens: list[int], prefix: str) -> Tokens:
        if place.path in mine or whole(place.path):
            raise ValueError(f"{place.path} has trainable tokens, so the same adapter cannot change it otherwise too")
        layer = _layer_at(place, state)
        adapter = Tokens(config, layer.site, place.path, *_place_of(layer, autocast, initialise), tokens, prefix)
        found.append((place, layer, adapter))
        mine[place.path] = adapter
        return adapter

    for name, tokens in wanted.items():
        named = [place for path, place in places.items() if f".{path}".endswith(f".{name}")]
        if not named:
            raise ValueError(f"trainable_token_indices names {name!r}, which matches no module{near([name], places)}")
        for place in named:
            add(place, tokens, "token_adapter.")
    modules = [(path, base_of(place.module)) for path, place in places.items()]
    for owner in [a for a in mine.values() if isinstance(a, Tokens)]:
        for path in tied_to(owner.site.module.weight, modules) if owner.owner else ():
            other = mine.get(path)
            if not isinstance(other, Tokens):
                other = add(places[path], owner.token_indices, owner.prefix)
            if other is not owner and other.token_indices == owner.token_indices:
                other.tie(owner)
    return found


def _share(adapters: dict[str, Adapter]) -> None:
    """Give the adapters of one name what they have in common."""
    for kind, group in by_class(adapters).items():
        module = kind.shared(group)
        for adapter in group.values() if module is not None else ():
            adapter.common = module


def _initialise(built: list[tuple[AdaptedLayer, Adapter]], initialise: bool) -> None:
    """Give the adapters their start, or those whose tensors come from a file what the file does not hold."""
    for layer, adapter in built:
        if adapter.replaces_base:
            _check_replaceable(layer, adapter)
    try:
        for _, adapter in built:
            adapter.reset() if initialise else adapter.prepare()
    except Exception:
        for _, adapter in built:
            adapter.release()
        raise


def _check_replaceable(layer: AdaptedLayer, adapter: Adapter) -> None:
    """Raise `ValueError` if the layer's base weight is not the adapter's to replace."""
    kind = type(layer.base_layer).__name__
    first = next((name for name, other in layer.adapters.items() if other.replaces_base), None)
    if first is not None:
        raise ValueError(
            f"adapter {first!r} runs this {kind} with a weight of its own: delete it before adding another"
        )
    if layer.merged_adapters:
        raise MergedError(f"{layer.merged_adapters} are merged into this {kind}: unmerge before its weight is replaced")


def install(place: Place, module: nn.Module) -> None:
    """Put `module` wherever the model holds this place's module."""
    if module is place.module:
        return
    for parent, child in place.holders:
        if isinstance(place.module, PromptLayer):  # which is no layer of the model's own
            place.module.detach()
            delattr(parent, child)
        else:
            setattr(parent, child, module)
    if isinstance(module, PromptLayer):
        module.attach()


@contextmanager
def no_collection() -> Iterator[None]:
    """Without the garbage collector, which would walk thousands of new modules again and again to free none.

    Afterwards they count as old, as what lives long does, rather than be walked at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_freeze_count() == 0:  # nobody has frozen objects, whom this would thaw
                gc.freeze()
                gc.unfreeze()  # back into the oldest generation
            gc.enable()

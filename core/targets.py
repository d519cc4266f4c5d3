"""Which modules an adapter goes to: PEFT's selection rules, and errors that name near misses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import nn

from .config import HEADS, LayeredConfig, PeftConfig, RankedConfig, TaskType, compile_pattern
from .errors import NoMatchingPeftModuleError, PeftWarning
from .layer import AdaptedLayer
from .sites import find, why_not

ALL_LINEAR = "all-linear"
CONDENSE_ABOVE = 20
"""Lists of targets longer than this are condensed to the shortest suffixes that select the same modules."""


@dataclass
class Place:
    """A module and every attribute that holds it: a module used twice has one path but two holders."""

    path: str
    module: nn.Module
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)


def walk(model: nn.Module) -> dict[str, Place]:
    """Every module below `model` by path, in the order of `named_modules`, seen through adapted layers."""
    places: dict[str, Place] = {}
    seen: dict[int, Place] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, module in parent._modules.items():
            if module is None:
                continue
            place = seen.get(id(module))
            if place is None:
                place = seen[id(module)] = Place(prefix + name, module)
                places[place.path] = place
                visit(module.base_layer if isinstance(module, AdaptedLayer) else module, f"{place.path}.")
            place.holders.append((parent, name))

    visit(model, "")
    return places


def matcher(targets: Iterable[str] | str | None) -> Callable[[str], bool]:
    """Whether a path is named by a regex over all of it, by one of a list of dotted suffixes, or as a mapping's key."""
    if targets is None:
        return lambda path: False
    if isinstance(targets, Mapping):
        return targets.__contains__
    if isinstance(targets, str):
        full = re.compile(targets)
        return lambda path: full.fullmatch(path) is not None
    suffixes = tuple(f".{t}" for t in targets)
    return lambda path: f".{path}".endswith(suffixes)


def inside(names: Iterable[str] | None) -> Callable[[str], bool]:
    """Whether a path is one of `names` (dotted suffixes) or lies inside such a module."""
    alternatives = "|".join(re.escape(n) for n in names or ())
    if not alternatives:
        return lambda path: False
    pattern = re.compile(rf"(^|.*\.)({alternatives})($|\..*)")
    return lambda path: pattern.match(path) is not None


def layer_filter(config: PeftConfig) -> Callable[[str], bool]:
    """Whether the first numbered part of a path is one of `layers_to_transform`."""
    if not isinstance(config, LayeredConfig) or config.layers_to_transform in (None, []):
        return lambda path: True
    chosen, names = config.layers_to_transform, config.layers_pattern
    indices = {chosen} if isinstance(chosen, int) else set(chosen or ())
    names = [names] if isinstance(names, str) else names
    # The lazy prefix finds the layer's index, not that of an expert inside it.
    prefixes = [rf"(?:^|.*?\.){n}" for n in names] if names else [r".*?\.[^.]*"]
    patterns = [re.compile(rf"{prefix}\.(\d+)\.") for prefix in prefixes]

    def chosen_layer(path: str) -> bool:
        found = next((m for p in patterns if (m := p.match(path))), None)
        return found is not None and int(found[1]) in indices

    return chosen_layer


def select(model: nn.Module, config: PeftConfig, places: dict[str, Place]) -> list[Place]:
    """The places that `config` targets, each of an adaptable kind.

    Resolves `config.target_modules` on the way ("all-linear", the model type's default, a long list), as PEFT does.

    Raises:
        NoMatchingPeftModuleError: nothing matches.
        ValueError: a matched module is of a kind that cannot be adapted.
    """
    excluded, saved = matcher(config.exclude_modules), inside(config.modules_to_save)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = all_linear(model, config, places)
    if config.target_modules is None and config.on_embeddings:
        config.target_modules = input_embedding(model, places)
    config.complete(getattr(getattr(model, "config", None), "model_type", None))
    targets, targeted, in_layer = config.target_modules or (), matcher(config.target_modules), layer_filter(config)
    hits = [p for path, p in places.items() if targeted(path) and (path in targets or in_layer(path))]
    chosen = [p for p in hits if not excluded(p.path) and not saved(p.path)]
    if not chosen:
        raise NoMatchingPeftModuleError(_nothing_matched(model, config, places, hits))
    if config.exclude_modules and not any(excluded(p.path) for p in hits):
        warnings.warn(
            f"You have passed exclude_modules={_shown(config.exclude_modules)} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            PeftWarning,
            stacklevel=4,
        )
    for place in chosen:
        base = base_of(place.module)
        site = find(type(base))
        if site is None or (site.elementwise and not config.norms):
            raise ValueError(f"{place.path}: a {type(base).__name__} cannot be adapted: {why_not(base)}")
    if isinstance(config.target_modules, set) and len(config.target_modules) > CONDENSE_ABOVE:
        config.target_modules = condense([p.path for p in chosen], places)
    return chosen


def select_parameters(model: nn.Module, config: PeftConfig, places: dict[str, Place]) -> list[tuple[Place, list[str]]]:
    """The modules that hold parameters of `config.target_parameters`, with the names of these.

    Raises:
        NoMatchingPeftModuleError: one of the targets matches nothing.
    """
    targets = getattr(config, "target_parameters", None) or []
    found: list[tuple[Place, list[str]]] = []
    used: set[str] = set()
    for path, place in places.items():
        names = []
        for name in base_of(place.module)._parameters:
            matching = [t for t in targets if f".{path}.{name}".endswith(f".{t}")]
            used.update(matching)
            names += [name] if matching else []
        if names:
            found.append((place, names))
    unused = sorted(set(targets) - used)
    if unused:
        known = {f"{path}.{name}" for path, place in places.items() for name in base_of(place.module)._parameters}
        message = f"target_parameters={unused} matches no parameter of {type(model).__name__}"
        raise NoMatchingPeftModuleError(message + near(unused, known))
    return found


def base_of(module: nn.Module) -> nn.Module:
    """The module without adapters."""
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def all_linear(model: nn.Module, config: PeftConfig, places: dict[str, Place]) -> set[str]:
    """Paths of all linear layers except the output head."""
    heads = set()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        heads.add(id(base_of(output)))
    elif config.task_type == TaskType.SEQ_CLS:
        heads.update(id(base_of(getattr(model, n))) for n in HEADS[TaskType.SEQ_CLS] if hasattr(model, n))
    bases = {path: base_of(place.module) for path, place in places.items()}
    return {path for path, m in bases.items() if (site := find(type(m))) and site.all_linear and id(m) not in heads}


def input_embedding(model: nn.Module, places: dict[str, Place]) -> str:
    """The path of the model's input embedding, as transformers' models tell, or "embed_tokens"."""
    found = getattr(model, "get_input_embeddings", lambda: None)()
    return next((path for path, place in places.items() if place.module is found), "embed_tokens")


def condense(chosen: Iterable[str], places: Iterable[str]) -> set[str]:
    """The shortest dotted suffixes that select exactly `chosen` among all `places`."""
    wanted = set(chosen)
    others = {suffix for path in places if path not in wanted for suffix in _suffixes(path)}
    found: set[str] = set()
    for path in sorted(wanted):
        if not any(suffix in found for suffix in _suffixes(path)):
            found.add(next((s for s in _suffixes(path) if s not in others), path))
    return found


def _suffixes(path: str) -> Iterator[str]:
    """Shortest first: "c", "b.c", "a.b.c"."""
    end = len(path)
    while (end := path.rfind(".", 0, end)) >= 0:
        yield path[end + 1 :]
    yield path


def check_patterns(config: PeftConfig, paths: list[str], strict: bool) -> None:
    """Report keys of `rank_pattern` and `alpha_pattern` that no target matches: a warning, or an error if `strict`."""
    if not isinstance(config, RankedConfig):
        return
    for name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, name)
        unused = sorted(k for k in keys if not any(compile_pattern(k).match(path) for path in paths))
        if not unused:
            continue
        message = f"The following {name} keys did not match any targeted module and were ignored: {unused}."
        if strict:
            raise ValueError(message.replace(" and were ignored", "") + near(unused, paths))
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def near(names: Iterable[str], paths: Iterable[str]) -> str:
    """ "; near: to_q (32 layers)" for names that resemble the last parts of some paths, or nothing."""
    counts: dict[str, int] = {}
    for path in paths:
        for suffix in dict.fromkeys((path.rpartition(".")[2], path)):
            counts[suffix] = counts.get(suffix, 0) + 1
    close = dict.fromkeys(c for n in names for c in get_close_matches(n, counts, n=3, cutoff=0.6))
    described = [f"{c} ({counts[c]} layer{'s' if counts[c] > 1 else ''})" for c in close]
    return f"; near: {', '.join(described[:4])}" if described else ""


def _nothing_matched(model: nn.Module, config: PeftConfig, places: dict[str, Place], hits: list[Place]) -> str:
    shown = f"target_modules={_shown(config.target_modules)}"
    if hits:
        return f"{shown} matches {len(hits)} modules of {type(model).__name__}, but all of them are excluded"
    adaptable = [path for path, p in places.items() if find(type(base_of(p.module)))]
    targets = config.target_modules or ()
    names = re.findall(r"\w+", targets) if isinstance(targets, str) else targets
    message = f"{shown} matches no layer of {type(model).__name__}{near(names, adaptable)}"
    layers = getattr(config, "layers_to_transform", None)
    return message if layers is None else f"{message} (with layers_to_transform={layers})"


def _shown(targets: Iterable[str] | str | None) -> str:
    return repr(targets) if targets is None or isinstance(targets, str) else repr(sorted(targets))

"""What a file means, from its header alone: which module, method, rank and scale each of its keys stands for.

No torch here. Readers follow the plan; `veneer inspect` shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod

from .canonical import Entry, Header, Plan, Shape
from .methods import FORMS, POISON, config_scale, is_full_lokr, ranks_of, scale_of, split_key
from .names import Names, Place, families, family_names
from .registry import detect

NEAR_SHOWN = 3
"""Modules without a place for which similar names are looked up: it takes tens of milliseconds each."""


@dataclass
class _Module:
    """The keys of one module of a file."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    """Factor -> key."""
    methods: set[str] = field(default_factory=set)


class _NoPlaceError(ValueError):
    """Why a module of the file cannot be used."""


def plan(header: Header, names: Names | None = None) -> Plan:
    """The meaning of a file.

    Arguments:
        names: the modules of the model; None takes the stored family that fits most of the file.

    Raises:
        ValueError: the file is no adapter in any known dialect.
    """
    dialect = detect(header)
    modules, unmatched = _modules(header)
    names = names or guess(header, modules)
    entries: list[Entry] = []
    for module in modules.values():
        try:
            entries += _entries(module, header, names)
        except _NoPlaceError as reason:
            unmatched |= dict.fromkeys(module.keys.values(), str(reason))
    _add_near(unmatched, modules, names)
    return Plan(dialect, tuple(entries), unmatched, tuple(_notes(header, entries)), names.family)


def guess(header: Header, modules: Mapping[str, _Module] | None = None) -> Names:
    """The stored family that has a place for most of the file's modules; of equals the first."""
    modules = _modules(header)[0] if modules is None else modules
    return max((family_names(f) for f in families()), key=lambda names: _fitting(header, modules, names))


def _fitting(header: Header, modules: Mapping[str, _Module], names: Names) -> int:
    fitting = 0
    for module in modules.values():
        with suppress(_NoPlaceError):
            fitting += len(_entries(module, header, names)) > 0
    return fitting


def _modules(header: Header) -> tuple[dict[str, _Module], dict[str, str]]:
    """Keys by the module that they belong to, and those that end like no adapter's."""
    modules: dict[str, _Module] = {}
    stray: dict[str, str] = {}
    for key in header.shapes:
        found = split_key(key)
        if found is None:
            stray[key] = "no adapter's tensor ends so"
            continue
        name, method, factor = found
        module = modules.setdefault(name, _Module(name))
        if factor in module.keys:
            stray[key] = f"{module.keys[factor]} says the same already"
            continue
        module.keys[factor] = key
        if method:
            module.methods.add(method)
    return modules, stray


def _entries(module: _Module, header: Header, names: Names) -> list[Entry]:
    places = names.places.get(module.name)
    if places is None:
        raise _NoPlaceError(f"{names.family} has no module of this name")
    whole = _whole_shape(places, names)
    method, keys = _under_our_names(module, header, whole)
    shapes = {factor: header.shapes[key] for factor, key in keys.items()}
    check_factors(method, shapes)
    check_size(method, shapes, whole)
    return [_entry(place, module, method, keys, shapes, header) for place in places]


def _under_our_names(module: _Module, header: Header, whole: Shape) -> tuple[str, dict[str, str]]:
    """The one method of a module, and the keys of its factors; alphas and scalars are no factors."""
    methods, keys = set(module.methods), dict(module.keys)
    if methods == {"lora", "full"} and "diff" not in keys:  # a LoRA with a change of the bias beside it
        methods.discard("full")
        keys["lora_B.bias"] = keys.pop("diff_b")
    if len(methods) != 1:
        found = " and ".join(sorted(methods)) or "none"
        raise _NoPlaceError(f"the tensors of a module should be of one method, and these are of {found}")
    (method,) = methods
    alpha = keys.pop("alpha", None)
    keys.pop("scalar", None)
    if "dora_scale" in keys:
        key = keys.pop("dora_scale")
        keys[_magnitude(header.shapes[key], whole)] = key
    if method == "oft" and alpha is not None:
        keys["constraint"] = alpha
    if method == "ia3":
        on_input = _number(keys.pop("on_input", None), header)
        if on_input is None or "weight" not in keys:
            raise _NoPlaceError("no adapter's tensor ends so")
        keys["ia3_in" if on_input else "ia3_out"] = keys.pop("weight")
    return method, keys


def _magnitude(shape: Shape, whole: Shape) -> str:
    """LyCORIS stores the norms of rows as (out, 1, ...), those of input channels as (1, in, ...)."""
    if len(whole) < 2:
        raise _NoPlaceError("dora_scale belongs to a layer with a matrix, and this is a norm")
    columns = len(shape) > 1 and shape[0] == 1 != whole[0]
    if prod(shape) != (whole[1] if columns else whole[0]):
        raise _NoPlaceError(f"dora_scale has shape {list(shape)}, and the layer is {whole[0]} x {whole[1]}")
    return "dora_in" if columns else "lora_magnitude_vector"


def _entry(
    place: Place, module: _Module, method: str, keys: Mapping[str, str], shapes: Mapping[str, Shape], header: Header
) -> Entry:
    alpha, scalar = (_number(module.keys.get(name), header) for name in ("alpha", "scalar"))
    rank = FORMS[method].rank(shapes)
    scale = config_scale(header.configs.get(place.component, {}), place.path, rank) if alpha is None else None
    if scale is None:
        try:
            scale = scale_of(method, shapes, alpha)
        except ValueError as error:
            raise _NoPlaceError(str(error)) from None
    magnitude = next((name for name in ("lora_magnitude_vector", "dora_in") if name in keys), None)
    scale *= 1.0 if scalar is None else scalar
    return Entry(place.component, place.path, method, keys, scale, rank, place.rows, magnitude, alpha)


def _number(key: str | None, header: Header) -> float | None:
    if key is None:
        return None
    if key not in header.scalars:
        raise _NoPlaceError(f"it has shape {list(header.shapes[key])}, expected one number")
    return header.scalars[key]


def check_factors(method: str, shapes: Mapping[str, Shape]) -> None:
    """Whether these are the factors of one adapter: all there, and of one rank.

    Raises:
        ValueError: they are not.
    """
    form, given = FORMS[method], set(shapes)
    if not any(needed <= given <= needed | form.more for needed in form.sets):
        wanted = " or ".join(", ".join(sorted(needed)) for needed in form.sets)
        raise _NoPlaceError(f"a {method} needs {wanted}, and here are {', '.join(sorted(given))}")
    try:
        ranks = ranks_of(method, shapes)
    except IndexError:
        raise _shapeless(method, shapes) from None
    for group in ranks:
        if len(set(group.values())) > 1 or 0 in group.values():
            listed = ", ".join(f"{axis} is {size}" for axis, size in group.items())
            raise _NoPlaceError(f"its factors should be of one rank, 1 or more, and {listed}")


def _shapeless(method: str, shapes: Mapping[str, Shape]) -> _NoPlaceError:
    return _NoPlaceError(f"shapes {', '.join(str(list(s)) for s in shapes.values())} are none of a {method}")


def _whole_shape(places: tuple[Place, ...], names: Names) -> Shape:
    """Shape of the weight that a name means: of a fused one, with the rows of all its members."""
    shapes = [names.tables[place.component][place.path] for place in places]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def check_size(method: str, shapes: Mapping[str, Shape], whole: Shape) -> None:
    """Hold the size of the layer that the factors fit against that of the layer that is there.

    Raises:
        ValueError: they differ.
    """
    try:
        rows, columns = FORMS[method].size(shapes)
    except IndexError:
        raise _shapeless(method, shapes) from None
    expected = whole[0], prod(whole[1:])
    if rows not in (None, expected[0]) or columns not in (None, expected[1]):
        fits = " x ".join("any" if n is None else str(n) for n in (rows, columns))
        raise _NoPlaceError(
            f"it fits a layer of {fits}, and this one is {expected[0]} x {expected[1]}: another model's file?"
        )


def _add_near(unmatched: dict[str, str], modules: Mapping[str, _Module], names: Names) -> None:
    """Name what a misspelt module may have meant."""
    strange = [m for m in modules.values() if m.name not in names.places][:NEAR_SHOWN]
    for module in strange:
        if near := names.near(module.name):
            for key in module.keys.values():
                unmatched[key] += f"; near: {', '.join(near)}"


def _notes(header: Header, entries: list[Entry]) -> Iterator[str]:
    """Readings that are a choice."""
    dim = _maybe_float(header.metadata.get("ss_network_dim"))
    for entry in entries:
        full = entry.method == "lokr" and is_full_lokr(dict.fromkeys(entry.keys, ()))
        if full and dim and entry.alpha not in (None, 0, dim) and abs(entry.alpha) < POISON:
            yield (
                f"LoKr of two full factors with alpha {entry.alpha:g} at dim {dim:g}: read at scale 1, as LyCORIS, "
                f"ComfyUI and diffusers do; if its trainer meant alpha / dim, use it at weight {entry.alpha / dim:g}"
            )
            return


def _maybe_float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None

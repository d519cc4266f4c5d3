"""From a file of any dialect to a canonical adapter, and from that to what the core loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import AdapterFileError
from .canonical import Canonical, Entry, Header, Layer, Plan
from .names import Names
from .plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters import Adapters


def read(path: str | Path, names: Names | None = None, strict: bool = True) -> Canonical:
    """The adapter in a safetensors file of any dialect, or in a PEFT directory.

    Arguments:
        names: the modules of the model that it is for; None takes the stored family that fits most of the file.
        strict: False leaves out what has no place; the result lists it as `unmatched`.

    Raises:
        AdapterFileError: the file is damaged, in no known dialect or, if `strict`, holds anything without a place.
    """
    path = Path(path)
    if path.is_dir():
        from .peft_dir import read_canonical

        return read_canonical(path)
    header = Header.of_file(path)
    try:
        found = plan(header, names)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    check_matched(found, path, strict)
    return Canonical(_layers(found, path), header.metadata, found.unmatched, found.notes)


def check_matched(found: Plan, path: Path, strict: bool, shown: int = 4) -> None:
    """Refuse a file with keys that have no place, naming some and what they may have meant.

    Raises:
        AdapterFileError: with `strict` any such key, else nothing but such keys.
    """
    if found.unmatched and (strict or not found.entries):
        told = "; ".join(f"{key} ({why})" for key, why in list(found.unmatched.items())[:shown])
        more = f" and {len(found.unmatched) - shown} more" if len(found.unmatched) > shown else ""
        way_out = ". strict=False loads the rest" if found.entries else ""
        raise AdapterFileError(f"{path}: {len(found.unmatched)} tensors have no place: {told}{more}{way_out}")


def _layers(found: Plan, path: Path) -> dict[str, dict[str, Layer]]:
    from ...core.files import read_tensors

    tensors = read_tensors(path)
    components: dict[str, dict[str, Layer]] = {}
    for entry in found.entries:
        components.setdefault(entry.component, {})[entry.path] = _layer(entry, tensors, path)
    return components


def _layer(entry: Entry, tensors: Mapping[str, Tensor], path: Path) -> Layer:
    layer = Layer(entry.method, {factor: tensors[key] for factor, key in entry.keys.items()}, entry.scale)
    if "lora_B.bias" in layer.factors and "diff_b" in entry.keys["lora_B.bias"]:  # not scaled in the file
        layer = Layer("lora", {**layer.factors, "lora_B.bias": layer.factors["lora_B.bias"] / entry.scale}, entry.scale)
    if entry.rows is None:
        return layer
    from .fused import split

    try:
        return split(layer, entry.rows, next(iter(entry.keys.values())))
    except ValueError as error:
        raise AdapterFileError(f"{path}: {error}") from error


def to_core(adapter: Canonical, names: Names) -> Adapters:
    """What the core loads: for each component a config of its layers, and tensors by canonical path.

    Raises:
        ValueError: a component or module that `names` do not have, or factors that do not fit one.
    """
    from ...core.tuners.layerwise import LayerwiseConfig
    from .forms import formed

    adapters: Adapters = {}
    for component, layers in adapter.components.items():
        table = names.tables.get(component)
        if table is None:
            raise ValueError(f"the adapter is for {component}, which {names.family} does not have")
        configs, tensors = {}, {}
        for path, layer in layers.items():
            if path not in table:
                raise ValueError(f"the adapter is for {component}.{path}, which {names.family} does not have")
            configs[path], own = formed(layer, path, table[path])
            tensors |= {f"{path}.{slot}": tensor for slot, tensor in own.items()}
        adapters[component] = LayerwiseConfig(layers=configs), tensors
    return adapters

"""What a PEFT directory means, from its headers and configs: a folder for each component, or one folder alone.

Its paths are the model's own and its configs say the scales, so there is little to look up. A folder that is not named
for a pipeline's component belongs to some other model, and is taken at its word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.config import PREFIX, PeftType
from ...core.files import CONFIG_NAME, WEIGHTS_NAME, read_json
from ...core.header import read_header
from .canonical import Entry, Header, Plan, Shape
from .methods import FORMS, config_scale, split_key
from .names import COMPONENTS, Names, clip_path
from .plan import check_factors, check_size, guess
from .registry import Dialect

PEFT = Dialect("peft", "PEFT directory", re.compile(r"(?!)"))
"""Told by its folder, not by its keys."""
_MORE = {
    "ia3_l": ("ia3", "ia3_out"),
    "oft_R.weight": ("oft", "oft_R"),
    "lora_embedding_A": ("lora", "lora_A.weight"),
    "lora_embedding_B": ("lora", "lora_B.weight"),
}
"""Endings that only PEFT's files have -> (method, factor)."""
OTHER = "model"
"""The component of a folder that is none of a pipeline's."""


def component_folders(path: Path) -> dict[str, Path]:
    """Component -> its folder, for a PEFT directory of either kind; empty if `path` is none."""
    if (path / CONFIG_NAME).is_file():
        return {path.name if path.name in COMPONENTS else OTHER: path}
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG_NAME).is_file()}


def peft_header(path: Path) -> Header:
    """The headers of all components in one, keys with the component in front.

    Raises:
        AdapterFileError: a file is missing or damaged.
    """
    shapes, metadata, configs = {}, {}, {}
    for component, folder in component_folders(path).items():
        file = read_header(folder / WEIGHTS_NAME)
        configs[component] = read_json(folder / CONFIG_NAME)
        metadata |= file.metadata
        shapes |= {f"{component}.{key.removeprefix(PREFIX)}": info.shape for key, info in file.tensors.items()}
    return Header(shapes, metadata, configs=configs)


def plan_peft(header: Header, names: Names | None = None) -> Plan:
    """The meaning of what `peft_header` read; arguments as those of `plan.plan`."""
    names = names or guess(header)
    modules: dict[tuple[str, str], dict[str, str]] = {}
    methods: dict[tuple[str, str], str] = {}
    unmatched = {}
    for key in header.shapes:
        component, _, inner = key.partition(".")
        found = _split(inner)
        if found is None:
            unmatched[key] = "no adapter's tensor ends so"
            continue
        place = component, clip_path(found[0], nested=True)
        modules.setdefault(place, {})[found[2]] = key
        methods[place] = methods.get(place) or found[1]
    entries = []
    for (component, path), keys in modules.items():
        try:
            table = names.tables.get(component, {})
            if table and path not in table:
                raise ValueError(f"the {component} of {names.family} has no module of this name")
            _check_method(header.configs.get(component, {}))
            entries.append(_entry(component, path, methods[component, path], keys, header, table.get(path)))
        except ValueError as reason:
            unmatched |= dict.fromkeys(keys.values(), str(reason))
    return Plan(PEFT, tuple(entries), unmatched, family=names.family)


def _split(key: str) -> tuple[str, str, str] | None:
    """(path, method, factor) of a key without its component."""
    for ending, (method, factor) in _MORE.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), method, factor
    return split_key(key)


def _check_method(config: Mapping[str, Any]) -> None:
    known = [kind.value for kind in PeftType]
    if config.get("peft_type") not in known:
        raise ValueError(f"peft_type={config.get('peft_type')!r} is no method of this release; known: {known}")


def _entry(component: str, path: str, method: str, keys: dict[str, str], header: Header, whole: Shape | None) -> Entry:
    """One module's adapter.

    Raises:
        ValueError: its tensors are not those of one adapter, or of one for a layer of another size than `whole`.
    """
    if "dora_scale" in keys:
        keys["lora_magnitude_vector"] = keys.pop("dora_scale")
    shapes = {factor: header.shapes[key] for factor, key in keys.items()}
    if method == "ia3":
        side = "ia3_in" if shapes["ia3_out"][:1] == (1,) else "ia3_out"
        return Entry(component, path, method, {side: keys["ia3_out"]}, 1.0)
    if method == "oft":
        return Entry(component, path, method, keys, 1.0)
    check_factors(method, shapes)
    if whole is not None:
        check_size(method, shapes, whole)
    rank = FORMS[method].rank(shapes)
    scale = config_scale(header.configs.get(component, {}), path, rank)
    magnitude = "lora_magnitude_vector" if "lora_magnitude_vector" in keys else None
    return Entry(component, path, method, keys, 1.0 if scale is None else scale, rank, None, magnitude)

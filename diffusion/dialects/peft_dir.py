"""PEFT directories: one folder a component (`unet/`, `text_encoder/`), each as `peft` reads and writes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...core import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, files
from ...core.config import RankedConfig
from ...core.targets import condense, matcher
from ...core.tuners.lokr import factorization
from ..adapters import Adapters
from .canonical import Canonical, Shape
from .forms import formed
from .names import COMPONENTS, Names, clip_path

WAY_OUT = "convert to LoRA first (--method lora --rank N)"
_KNOWN: tuple[type[RankedConfig], ...] = (LoraConfig, LoHaConfig, LoKrConfig)


def is_peft_dir(path: Path) -> bool:
    return any((path / name / "adapter_config.json").is_file() for name in COMPONENTS)


def write_peft_dir(path: Path, adapters: Adapters, metadata: dict[str, str] | None = None) -> None:
    """Write each component's folder, atomically one by one. `metadata` goes into the safetensors headers."""
    for name, (config, tensors) in adapters.items():
        files.save_adapter(path / name, config, tensors, metadata)


def read_peft_dir(path: Path) -> Adapters:
    """All components that `path` holds."""
    found = [name for name in COMPONENTS if (path / name / "adapter_config.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no PEFT adapter in any of the folders {', '.join(COMPONENTS)}")
    return {name: files.load_adapter(path / name) for name in found}


def read_canonical(path: Path) -> Canonical:
    """A PEFT directory as a canonical adapter.

    Raises:
        ValueError: it holds what only PEFT's directories can hold.
    """
    from .writing import from_core

    adapters = read_peft_dir(path)
    metadata = files.read_metadata(path / next(iter(adapters)) / files.WEIGHTS_NAME)
    return from_core(adapters, {key: value for key, value in metadata.items() if key != "format"})


def to_peft(adapter: Canonical, names: Names) -> Adapters:
    """One config of PEFT's for each component, and tensors under the paths of the installed transformers.

    Raises:
        ValueError: PEFT has no such method or mixture; says which, and the way out.
    """
    adapters: Adapters = {}
    for component, layers in adapter.components.items():
        table = names.tables.get(component, {})
        strange = next((path for path in layers if path not in table), None)
        if strange:
            raise ValueError(f"{names.family} has no module {component}.{strange}")
        shapes = {path: table[path] for path in layers}
        forms = {path: formed(layer, path, shapes[path]) for path, layer in layers.items()}
        config = one_config(component, {path: config for path, (config, _) in forms.items()}, shapes)
        nested = not (component == "text_encoder" and _clip_is_flat())
        chosen = {clip_path(path, nested=nested) for path in layers}
        config = replace(config, target_modules=targets(chosen, [clip_path(path, nested=nested) for path in table]))
        tensors = {
            clip_path(f"{path}.{slot}", nested=nested): tensor
            for path, (_, own) in forms.items()
            for slot, tensor in own.items()
        }
        adapters[component] = config, tensors
    return adapters


def _clip_is_flat() -> bool:
    """Whether the installed transformers has CLIPTextModel's parts at its top; its version with projection keeps them
    in `text_model`."""
    major, minor, *_ = map(int, re.findall(r"\d+", version("transformers"))[:2])
    return (major, minor) >= (5, 6)


def one_config(component: str, configs: Mapping[str, PeftConfig], shapes: Mapping[str, Shape]) -> RankedConfig:
    """One config for layers that have one each: ranks and alphas become patterns, all else has to agree.

    Raises:
        ValueError: it does not.
    """
    kinds = {type(config) for config in configs.values()}
    if len(kinds) > 1:
        found = ", ".join(sorted(str(kind.peft_type) for kind in kinds))
        raise ValueError(f"{component} mixes {found}, and a PEFT directory holds one method: {WAY_OUT}")
    (kind,) = kinds
    if kind not in _KNOWN:
        raise ValueError(f"{component}: PEFT has no {kind.peft_type}: {WAY_OUT}")
    ranked: dict[str, Any] = dict(configs)
    if kind is not LoraConfig and any(config.use_dora for config in ranked.values()):
        raise ValueError(f"{component}: PEFT has DoRA over LoRA only, not over {kind.peft_type}: {WAY_OUT}")
    if any(config.dora_on_input for config in ranked.values()):
        raise ValueError(f"{component}: PEFT's DoRA has magnitudes of rows, and these are of input channels: {WAY_OUT}")
    common = _agreed(component, ranked, shapes)
    if kind is LoKrConfig:
        common |= {"decompose_factor": _decompose_factor(component, ranked, shapes), "left_shape": None}
    ranks = {path: config.r for path, config in ranked.items()}
    alphas = {path: _whole(getattr(config, kind.alpha_field)) for path, config in ranked.items()}
    (r, rank_pattern), (alpha, alpha_pattern) = _pattern(ranks), _pattern(alphas)
    return kind(**common, r=r, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, **{kind.alpha_field: alpha})


def _agreed(component: str, configs: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Options that all layers share; Tucker kernels only concern layers that have a kernel."""
    own = {"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "left_shape", "use_effective_conv2d"}
    names = [f.name for f in fields(next(iter(configs.values()))) if f.init and f.name not in own]
    if hasattr(next(iter(configs.values())), "use_effective_conv2d"):
        kernels = {
            configs[path].use_effective_conv2d for path, shape in shapes.items() if max(shape[2:], default=1) > 1
        }
        if len(kernels) > 1:
            raise ValueError(
                f"{component}: some kernels are Tucker products, and PEFT has all of them so or none: {WAY_OUT}"
            )
        common: dict[str, Any] = {"use_effective_conv2d": kernels.pop() if kernels else False}
    else:
        common = {}
    for name in names:
        values = [getattr(config, name) for config in configs.values()]
        if any(value != values[0] for value in values):
            raise ValueError(f"{component}: {name} differs between layers, and PEFT has one for all: {WAY_OUT}")
        common[name] = values[0]
    return common


def _whole(alpha: float) -> float:
    """An alpha as PEFT's configs have it: an integer where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, float]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by exact path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {pattern_key(path): value for path, value in values.items() if value != common}


def pattern_key(path: str) -> str:
    """A `rank_pattern` key that matches this module alone: CLIP's with and without `text_model.`"""
    flat = clip_path(path, nested=False)
    return re.escape(flat) if flat != path else f"^{re.escape(path)}"


def _decompose_factor(component: str, configs: Mapping[str, Any], shapes: Mapping[str, Shape]) -> int:
    """The factor by which PEFT splits every layer as it is split here."""
    lefts = {path: config.left_shape for path, config in configs.items()}
    for factor in (-1, *sorted({side for left in lefts.values() for side in left})):
        if all(
            left == (factorization(shapes[path][0], factor)[0], factorization(shapes[path][1], factor)[0])
            for path, left in lefts.items()
        ):
            return factor
    raise ValueError(
        f"{component}: PEFT has no decompose_factor that splits every layer as these LoKr factors: {WAY_OUT}"
    )


def targets(chosen: Iterable[str], table: Iterable[str]) -> set[str] | str:
    """`target_modules` that name exactly `chosen`: suffixes, or a regex where a suffix would catch more."""
    wanted = set(chosen)
    suffixes = condense(wanted, table)
    matches = matcher(suffixes)
    if all(matches(path) == (path in wanted) for path in table):
        return suffixes
    return "|".join(re.escape(path) for path in sorted(wanted))

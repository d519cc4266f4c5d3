"""From a canonical adapter to a file of a dialect, such that all of its readers agree on what it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import wide
from ...core.targets import matcher
from ...core.tuners.layerwise import LayerwiseConfig
from ..adapters import Adapters
from .canonical import CONFIGS, Canonical, Layer, Shape
from .fused import fuse
from .methods import FORMS, config_scale, is_full_lokr, split_key
from .names import Names, Place, Spelling, clip_path, families, family_names
from .registry import DIALECTS

Written = dict[str, Tensor]


def write(path: str | Path, adapter: Canonical, dialect: str, names: Names | None = None) -> None:
    """Write `adapter` to `path`, atomically: a file, or for "peft" a directory.

    Arguments:
        dialect: a name of `DIALECTS`.
        names: the modules of the model; None takes the stored family that has most of the adapter's.

    Raises:
        ValueError: the dialect is only read, or cannot express the adapter; says why, and the way out.
    """
    from ...core.files import write_tensors

    target = DIALECTS.get(dialect)
    writable = [name for name, d in DIALECTS.items() if d.write] + ["peft"]
    names = names or family_of(adapter)
    if dialect == "peft":
        from .peft_dir import to_peft, write_peft_dir

        write_peft_dir(Path(path), to_peft(adapter, names), dict(adapter.metadata))
    elif target is None or target.write is None:
        raise ValueError(f"{dialect!r} is no dialect that is written; known: {', '.join(writable)}")
    else:
        tensors, metadata = target.write(adapter, names)
        write_tensors(Path(path), tensors, {**_own(adapter.metadata), **metadata})


def _own(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file said of itself that is true in another dialect too."""
    return {k: v for k, v in metadata.items() if k not in (CONFIGS, "format") and not k.startswith("ss_network_")}


def family_of(adapter: Canonical) -> Names:
    """The stored family that has most of the adapter's modules."""
    paths = list(adapter.layers())
    return max(
        map(family_names, families()), key=lambda names: sum(path in names.tables.get(part, {}) for part, path in paths)
    )


def from_core(adapters: Adapters, metadata: Mapping[str, str] | None = None) -> Canonical:
    """What the core holds, as a canonical adapter.

    Raises:
        ValueError: a method or trained part that only PEFT's directories can hold.
    """
    components: dict[str, dict[str, Layer]] = {}
    for component, (config, tensors) in adapters.items():
        if getattr(config, "needs_base", False):
            raise ValueError(
                f"{component}: init_lora_weights={config.init_lora_weights!r} needs the base weights that it "  # type: ignore[attr-defined]
                "started from: attach it and write a plain LoRA with save_as_lora"
            )
        layered = config.layers if isinstance(config, LayerwiseConfig) else {}
        values = {id(c): c.to_dict() for c in layered.values() or [config]}
        by_path: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            path, _, factor = _slot(component, key)
            by_path.setdefault(path, {})[factor] = tensor
        components[component] = {
            clip_path(path, nested=True): _layer(values[id(layered.get(path, config))], path, factors)
            for path, factors in by_path.items()
        }
    return Canonical(components, metadata or {})


def _slot(component: str, key: str) -> tuple[str, str, str]:
    if key.endswith(".ia3_l"):
        return key.removesuffix(".ia3_l"), "ia3", "ia3_l"
    found = split_key(key)
    if found is None or found[2] in ("weight", "on_input"):
        raise ValueError(f"{component}.{key}: only a PEFT directory can hold this tensor")
    return found


def _layer(config: Mapping[str, Any], path: str, factors: dict[str, Tensor]) -> Layer:
    """A layer from its tensors, and from its config as plain values."""
    method = next(name for key in factors if (name := _method_of(key)))
    if method == "ia3":
        if not matcher(config.get("feedforward_modules"))(path):
            raise ValueError(f"{path}: an IA3 that scales the output, bias included, only PEFT's directories can hold")
        return Layer("ia3", {"ia3_in": factors["ia3_l"].flatten() - 1})
    if method == "full" and factors["diff"].ndim == 1:
        method, factors = "norm", {{"diff": "w_norm", "diff_b": "b_norm"}[key]: t for key, t in factors.items()}
    if config.get("dora_on_input"):
        factors["dora_in"] = factors.pop("lora_magnitude_vector")
    if config.get("constraint"):
        factors["constraint"] = torch.tensor(float(config["constraint"]))
    scale = config["scale"] if "scale" in config else config_scale(config, path, None)
    return Layer(method, factors, 1.0 if scale is None else float(scale))


def _method_of(factor: str) -> str:
    if factor == "ia3_l":
        return "ia3"
    return next((method for method, form in FORMS.items() if any(factor in needed for needed in form.sets)), "")


# ---------------------------------------------------------------- the keys of kohya and ComfyUI


def by_module(adapter: Canonical, names: Names, spelling: Callable[[Names, str], Spelling]) -> Written:
    """kohya's and LyCORIS' tensors, with an alpha for each module, under names of a spelling."""
    written: Written = {}
    for component, layers in adapter.components.items():
        table = _table(names, component)
        places = names.spelled(component, spelling(names, component))
        placed = {place.path for own in places.values() for place in own}
        lost = [path for path in layers if path not in table or path not in placed]
        if lost:
            raise ValueError(f"{names.family} has no module {component}.{lost[0]}, or this dialect has no name for it")
        for name, own in places.items():
            if any(place.path in layers for place in own):
                layer, shape = _gathered(name, own, layers, table)
                written |= {f"{name}.{key}": tensor for key, tensor in lycoris_tensors(layer, shape).items()}
    return written


def _table(names: Names, component: str) -> Mapping[str, Shape]:
    if component not in names.tables:
        raise ValueError(f"the adapter is for {component}, which {names.family} does not have")
    return names.tables[component]


def _gathered(
    name: str, places: Iterable[Place], layers: Mapping[str, Layer], table: Mapping[str, Shape]
) -> tuple[Layer, Shape]:
    places = list(places)
    shapes = [table[place.path] for place in places]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    if places[0].rows is None:
        return layers[places[0].path], shape
    return fuse([layers.get(place.path) for place in places], [place.rows or () for place in places], name), shape


def lycoris_tensors(layer: Layer, shape: Shape) -> Written:
    """One module's tensors under LyCORIS' names, for a weight of `shape`."""
    ones = [1] * len(shape[2:])
    written = _TENSORS[layer.method](layer, shape[2:])
    if "lora_magnitude_vector" in layer.factors:
        written["dora_scale"] = layer.factors["lora_magnitude_vector"].reshape(-1, 1, *ones)
    if "dora_in" in layer.factors:
        written["dora_scale"] = layer.factors["dora_in"].reshape(1, -1, *ones)
    return written


def alpha_of(layer: Layer) -> Tensor:
    """The alpha that every reader of `.alpha` turns back into the scale."""
    rank = FORMS[layer.method].rank({key: tuple(t.shape) for key, t in layer.factors.items()})
    return torch.tensor(float(layer.scale * (rank or 1)))


def _lora_tensors(layer: Layer, kernel: Shape) -> Written:
    factors, ones = layer.factors, [1] * len(kernel)
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    mid = factors.get("lora_mid.weight")
    written = {
        "lora_down.weight": down.reshape(down.shape[0], -1, *(kernel if mid is None else ones)),
        "lora_up.weight": up.reshape(*up.shape[:2], *ones),
        "alpha": alpha_of(layer),
    }
    if mid is not None:
        written["lora_mid.weight"] = mid
    if "lora_B.bias" in factors:
        written["diff_b"] = layer.scale * wide(factors["lora_B.bias"])
    return written


def _lokr_tensors(layer: Layer, kernel: Shape) -> Written:
    factors = _plain(layer)
    if is_full_lokr({key: tuple(t.shape) for key, t in factors.items()}):  # readers ignore alpha: the scale goes inside
        factors["lokr_w1"] = layer.scale * wide(factors["lokr_w1"])
        return factors | {"alpha": torch.tensor(1.0)}
    return factors | {"alpha": alpha_of(layer)}


def _plain(layer: Layer) -> Written:
    return {key: t for key, t in layer.factors.items() if key not in ("lora_magnitude_vector", "dora_in")}


def _ia3_tensors(layer: Layer, kernel: Shape) -> Written:
    on_input = "ia3_in" in layer.factors
    weight = layer.factors["ia3_in" if on_input else "ia3_out"].flatten()
    shaped = weight.reshape(1, -1, *[1] * len(kernel)) if kernel else weight
    return {"weight": layer.scale * shaped, "on_input": torch.tensor(int(on_input))}


def _oft_tensors(layer: Layer, kernel: Shape) -> Written:
    written = {"oft_blocks": layer.factors["oft_blocks"], "alpha": torch.tensor(0.0)}
    if "constraint" in layer.factors:
        written["alpha"] = layer.factors["constraint"]
    if "rescale" in layer.factors:
        written["rescale"] = layer.factors["rescale"].reshape(-1, 1, *[1] * len(kernel))
    return written


_TENSORS: Mapping[str, Callable[[Layer, Shape], Written]] = {
    "lora": _lora_tensors,
    "loha": lambda layer, kernel: _plain(layer) | {"alpha": alpha_of(layer)},
    "lokr": _lokr_tensors,
    "full": lambda layer, kernel: {key: layer.scale * wide(t) for key, t in layer.factors.items()},
    "norm": lambda layer, kernel: {key: layer.scale * wide(t) for key, t in layer.factors.items()},
    "glora": lambda layer, kernel: _plain(layer) | {"alpha": alpha_of(layer)},
    "ia3": _ia3_tensors,
    "oft": _oft_tensors,
}


def common_rank(adapter: Canonical) -> int:
    """The rank that most modules have, 1 if none has any."""
    ranks = (
        FORMS[layer.method].rank({key: tuple(t.shape) for key, t in layer.factors.items()})
        for layer in adapter.layers().values()
    )
    counts = Counter(rank for rank in ranks if rank)
    return counts.most_common(1)[0][0] if counts else 1

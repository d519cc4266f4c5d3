"""Adapters on a diffusers pipeline: load, weigh, take off again. Without `peft`, without `cross_attention_kwargs`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ..core import AdaptedModel, PeftConfig, PeftWarning
from ..core.files import WEIGHTS_NAME, read_metadata, write_tensors
from ..core.tuners.layerwise import LayerwiseConfig
from ..core.weights import Weight, resolve
from .adapters import Adapters
from .dialects import diffusers_file
from .dialects.canonical import Canonical
from .dialects.diffusers_file import FILE_NAME
from .dialects.names import Names, fit_names
from .dialects.peft_dir import is_peft_dir, read_peft_dir, write_peft_dir
from .dialects.reading import read, to_core
from .dialects.writing import family_of, from_core, write

_ADAPTED: WeakKeyDictionary[Any, dict[str, AdaptedModel]] = WeakKeyDictionary()
"""Adapted components by pipeline. Kept here and not on the pipeline, which stays as its library made it."""


class LoadReport(NamedTuple):
    """What a file held beside what was loaded."""

    unmatched: dict[str, str]
    """Key without a place on the pipeline -> why, with the nearest names; empty unless `strict=False`."""
    notes: tuple[str, ...]
    """Where the file can be read in several ways, and which was taken."""


def read_adapter(path: str | Path, revision: str | None = None) -> Adapters:
    """Adapters by component, from a run directory, a folder with `unet/` or `text_encoder/`, a file of any dialect, or
    a hub id that holds either. Names are looked up in the family that fits the file best."""
    local = _locate(path, revision)
    if not local.is_file():
        return read_peft_dir(local)
    adapter = read(local)
    return to_core(adapter, family_of(adapter))


def adapter_metadata(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """What the adapter at `path` tells of itself: `base_model`, `trigger`, `steps`, `recipe`, where it does."""
    local = _locate(path, revision)
    return read_metadata(local if local.is_file() else next(local.glob(f"*/{WEIGHTS_NAME}")))


def save_adapter(
    path: Path,
    adapters: Adapters,
    metadata: dict[str, str],
    to: str | None = None,
    names: Names | None = None,
) -> bool:
    """Write an adapter as PEFT directories and, where diffusers knows its method, as diffusers' file too.

    Returns whether it does.

    Arguments:
        to: the dialect of one file at `path` instead: "diffusers", "kohya", "comfy", or "peft" for directories alone.
        names: the modules of the model, which `to` may need; None takes the family that has most of them.
    """
    if to is not None:
        write(path, from_core(adapters, metadata), to, names)
        return to == "diffusers"
    path.mkdir(parents=True, exist_ok=True)
    write_peft_dir(path, adapters, metadata)
    for_diffusers = _for_diffusers(adapters)
    if for_diffusers is not None:
        tensors, header = diffusers_file.write(for_diffusers, names)
        write_tensors(path / FILE_NAME, tensors, metadata | header)
    return for_diffusers is not None


def _for_diffusers(adapters: Adapters) -> Canonical | None:
    """The adapter as diffusers can have it, if it can."""
    try:
        adapter = from_core(adapters)
    except ValueError:
        return None
    return adapter if diffusers_file.why_not(adapter) is None else None


def _locate(path: str | Path, revision: str | None) -> Path:
    """The folder with PEFT directories or the file that `path` means."""
    local = Path(path).expanduser()
    if not local.exists():
        local = _download(str(path), revision)
    if local.is_file() or is_peft_dir(local):
        return local
    if (local / FILE_NAME).is_file():
        return local / FILE_NAME
    files = sorted(local.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"; it has {len(files)} .safetensors files, of which one has to be named" if files else ""
    raise FileNotFoundError(
        f"{path} holds no adapter: neither {FILE_NAME} nor a PEFT folder unet/ or text_encoder/{found}"
    )


def _download(name: str, revision: str | None) -> Path:
    """The adapter files of a hub repository; nothing else of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[FILE_NAME, "*/adapter_*"]))
    except HFValidationError:
        raise FileNotFoundError(f"{name} is neither a file nor a folder, and cannot be a repository's name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{name} is neither a file nor a folder, and on the hub: {reason}") from error


def load_adapter(
    pipe: Any,
    path: str | Path,
    name: str = "default",
    weight: float = 1.0,
    revision: str | None = None,
    strict: bool = True,
) -> LoadReport:
    """Put the adapter at `path` on `pipe` and switch it on, beside those already there.

    Arguments:
        path: as in `read_adapter`.
        name: to speak of it later.
        weight: 1.0 is as trained, 0.0 is off.
        strict: False loads what has a place and reports the rest, where True refuses the file.

    Raises:
        ValueError: the file does not fit the pipeline, or the name is taken; the pipeline is as it was.
    """
    adapted = _ADAPTED.setdefault(pipe, {})
    taken = [component for component, model in adapted.items() if name in model.configs]
    if taken:
        raise ValueError(f"the pipeline has an adapter {name!r} already; give this one another name")
    adapters, report = _read_for(pipe, path, revision, strict)
    for note in report.notes:
        warnings.warn(f"{path}: {note}", PeftWarning, stacklevel=2)
    try:
        for component, (config, tensors) in adapters.items():
            model = adapted.setdefault(component, AdaptedModel(getattr(pipe, component)))
            model.load(name, _fitted(config, model.model), fit_names(tensors, model.model))
            model.activate(*dict.fromkeys([*model.state.active, name]))
        set_weights(pipe, {name: weight})
    except Exception:  # half an adapter is worse than none
        remove_adapter(pipe, name)
        raise
    return report


def _read_for(pipe: Any, path: str | Path, revision: str | None, strict: bool) -> tuple[Adapters, LoadReport]:
    """The adapter at `path` for this very pipeline."""
    local = _locate(path, revision)
    if local.is_file():
        names = Names.of_pipeline(pipe)
        adapter = read(local, names, strict)
        return to_core(adapter, names), LoadReport(dict(adapter.unmatched), adapter.notes)
    adapters = read_peft_dir(local)
    missing = [component for component in adapters if getattr(pipe, component, None) is None]
    if missing:
        raise ValueError(f"{path} adapts {', '.join(missing)}, which {type(pipe).__name__} does not have")
    return adapters, LoadReport({}, ())


def _fitted(config: PeftConfig, model: Any) -> PeftConfig:
    """A config under the module paths of this very model."""
    return LayerwiseConfig(layers=fit_names(config.layers, model)) if isinstance(config, LayerwiseConfig) else config


def remove_adapter(pipe: Any, name: str) -> None:
    """Take one adapter off and forget it; the others stay."""
    for model in adapted_models(pipe).values():
        if name in model.configs:
            model.delete(name)


def set_weights(pipe: Any, weights: Mapping[str, Weight]) -> None:
    """Set the strength of loaded adapters by name, in every component; the others keep theirs.

    A weight is one number, or numbers by component, block or layer: `{"text_encoder": 0.5, "unet.up_blocks": 1.0}`, as
    `veneer.core.weights` reads them; the first that matches a layer decides, and what none matches stays as trained.

    Raises:
        ValueError: no such adapter, or a weight that is no number or matches nothing; nothing has changed then.
        MergedError: the adapter is merged into the weights.
    """
    for component, by_path in weights_by_component(pipe, weights).items():
        for name, weight in by_path.items():
            adapted_models(pipe)[component].set_weight(name, weight)


def merge(
    pipe: Any, weights: Mapping[str, Weight] | None = None, *, safe_merge: bool = False, progressbar: bool = False
) -> Any:
    """Fold adapters into the pipeline's weights, in place and for good. Returns `pipe`, a plain pipeline again.

    It saves with diffusers' `save_pretrained` and loads without Veneer.

    **Arguments**: `weights` by adapter, as `set_weights` takes them, for those to merge; None merges what is switched
    on at its present weight. `safe_merge` refuses weights that would become NaN or infinite. `progressbar` shows one.

    Raises:
        ValueError: no such adapter, a weight that is no number or matches nothing, or `safe_merge` found broken
            weights; nothing has changed then.
        NotMergeableError: a method that is no change of weights; nothing has changed then.
    """
    adapted = adapted_models(pipe)
    if not adapted:
        raise ValueError("the pipeline has no adapter to merge")
    chosen = None if weights is None else weights_by_component(pipe, weights)
    wanted: dict[str, dict[str, Any]] = {}
    for component in adapted:
        here = None if chosen is None else chosen.get(component, {})
        names = None if here is None else list(here)
        wanted[component] = {"names": names, "weights": here, "progressbar": progressbar}
    for component, model in adapted.items():  # all of them, before any is changed
        model.check_merge(**wanted[component], safe_merge=safe_merge)
    for component, model in adapted.items():
        model.merge_and_detach(**wanted[component])
    _ADAPTED.pop(pipe, None)
    return pipe


def weights_by_component(pipe: Any, weights: Mapping[str, Weight]) -> dict[str, dict[str, dict[str, float]]]:
    """Component -> adapter -> layer -> weight."""
    adapted = adapted_models(pipe)
    loaded = {name for model in adapted.values() for name in model.configs}
    unknown = sorted(weights.keys() - loaded)
    if unknown:
        has = ", ".join(sorted(loaded)) or "none"
        raise ValueError(f"the pipeline has no adapter {', '.join(unknown)}; it has {has}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, weight in weights.items():
        having = {component: model for component, model in adapted.items() if name in model.configs}
        places = [(component, path) for component, model in having.items() for path in model.adapters(name)]
        resolved = resolve(weight, [f"{component}.{path}" for component, path in places])
        for (component, path), number in zip(places, resolved.values(), strict=True):
            found.setdefault(component, {}).setdefault(name, {})[path] = number
    return found


def detach(pipe: Any) -> Any:
    """Take all adapters off: every module of the pipeline is the very object that it was. Returns `pipe`."""
    for model in _ADAPTED.pop(pipe, {}).values():
        model.detach()
    return pipe


def adapted_models(pipe: Any) -> dict[str, AdaptedModel]:
    """The adapted components of `pipe`, for whatever the functions here do not offer: merging, combining, reading."""
    return dict(_ADAPTED.get(pipe, {}))

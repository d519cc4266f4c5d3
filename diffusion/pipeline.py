"""Adapters on a diffusers pipeline: load, weigh, take off again. Without `peft`, without `cross_attention_kwargs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ..core import AdaptedModel
from ..core.files import WEIGHTS_NAME, read_metadata
from ..core.weights import Weight, resolve
from .adapters import Adapters
from .dialects.diffusers_file import FILE_NAME, can_express, read_diffusers_file, write_diffusers_file
from .dialects.names import fit_names
from .dialects.peft_dir import is_peft_dir, read_peft_dir, write_peft_dir

_ADAPTED: WeakKeyDictionary[Any, dict[str, AdaptedModel]] = WeakKeyDictionary()
"""Adapted components by pipeline. Kept here and not on the pipeline, which stays as its library made it."""


def read_adapter(path: str | Path, revision: str | None = None) -> Adapters:
    """Adapters by component, from a run directory, a folder with `unet/` or `text_encoder/`, a file in diffusers'
    format, or a hub id that holds either."""
    local = _locate(path, revision)
    return read_diffusers_file(local) if local.is_file() else read_peft_dir(local)


def adapter_metadata(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """What the adapter at `path` tells of itself: `base_model`, `trigger`, `steps`, `recipe`, where it does."""
    local = _locate(path, revision)
    return read_metadata(local if local.is_file() else next(local.glob(f"*/{WEIGHTS_NAME}")))


def save_adapter(folder: Path, adapters: Adapters, metadata: dict[str, str]) -> bool:
    """Write an adapter as PEFT directories and, where diffusers knows its method, as diffusers' file too.

    Returns whether it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_peft_dir(folder, adapters, metadata)
    if can_express(adapters):
        write_diffusers_file(folder / FILE_NAME, adapters, metadata)
    return can_express(adapters)


def _locate(path: str | Path, revision: str | None) -> Path:
    """The folder with PEFT directories or the diffusers file that `path` means."""
    local = Path(path).expanduser()
    if not local.exists():
        local = _download(str(path), revision)
    if local.is_file() or is_peft_dir(local):
        return local
    if (local / FILE_NAME).is_file():
        return local / FILE_NAME
    raise FileNotFoundError(f"{path} holds no adapter: neither {FILE_NAME} nor a PEFT folder unet/ or text_encoder/")


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
    pipe: Any, path: str | Path, name: str = "default", weight: float = 1.0, revision: str | None = None
) -> None:
    """Put the adapter at `path` on `pipe` and switch it on, beside those already there.

    **Arguments**: `path` as in `read_adapter`; `name` to speak of it later; `weight` 1.0 is as trained, 0.0 is off.
    """
    adapters = read_adapter(path, revision)
    missing = [component for component in adapters if getattr(pipe, component, None) is None]
    if missing:
        raise ValueError(f"{path} adapts {', '.join(missing)}, which {type(pipe).__name__} does not have")
    adapted = _ADAPTED.setdefault(pipe, {})
    taken = [component for component, model in adapted.items() if name in model.configs]
    if taken:
        raise ValueError(f"the pipeline has an adapter {name!r} already; give this one another name")
    try:
        for component, (config, tensors) in adapters.items():
            model = adapted.setdefault(component, AdaptedModel(getattr(pipe, component)))
            model.load(name, config, fit_names(tensors, model.model))
            model.activate(*dict.fromkeys([*model.state.active, name]))
        set_weights(pipe, {name: weight})
    except Exception:  # half an adapter is worse than none
        remove_adapter(pipe, name)
        raise


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

"""The verbs of transformers' own adapter integration, for any model of theirs and without `peft` installed.

Each takes the model first, so that it can become the model's method (`methods.py`). The model's tree holds all that
there is to know; what transformers itself looks at (`peft_config`, `_hf_peft_config_loaded`) is kept in step with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.assign import LoadResult
from ..core.config import PeftConfig, get_peft_config
from ..core.errors import PeftWarning
from ..core.files import load_adapter as read_adapter
from ..core.hotswap import hotswap as swap
from ..core.hotswap import prepare_model_for_compiled_hotswap
from ..core.methods import AdapterMethods
from ..core.model import PeftModel, _where, get_peft_model_state_dict
from ..core.steps import penalty

_UNNEEDED = {"device_map", "max_memory", "offload_index", "load_config"}
"""Options of transformers that change no result: tensors go to the device of their layer, without a detour."""
_TARGET_RANK = "_adapter_target_rank"
"""Attribute of a model that says up to which rank its adapters are to be swapped."""
_PUSHING = ("commit_message", "private", "token", "revision", "create_pr", "tags")
"""Options of `save_pretrained(push_to_hub=True)` that are the hub's."""


def add_adapter(model: nn.Module, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
    """Attach a fresh adapter of any method, and make it the active one.

    Arguments:
        adapter_name: None takes "default", or the next free of "default_2", "default_3", ...

    Raises:
        TypeError: the config is none of Veneer's.
        ValueError: the name is taken, or the config does not fit the model; nothing has changed then.
    """
    if not isinstance(adapter_config, PeftConfig):
        raise TypeError(f"adapter_config should be an instance of PeftConfig. Got {type(adapter_config)} instead.")
    peft = PeftModel.of(model)
    name = adapter_name or _free_name(peft.peft_config)
    peft.add_adapter(name, adapter_config)
    if adapter_config.base_model_name_or_path is None:
        adapter_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    _welcome(peft, name)


def load_adapter(
    model: nn.Module,
    peft_model_id: str | Path | None = None,
    adapter_name: str | None = None,
    peft_config: PeftConfig | dict[str, Any] | None = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    is_trainable: bool = False,
    hotswap: bool | Literal["auto"] = "auto",
    adapter_kwargs: dict[str, Any] | None = None,
    **options: Any,
) -> LoadResult:
    """Attach the adapter of a directory or hub id, or of a config and tensors in memory, and make it the active one.

    Arguments:
        adapter_name: None means "default".
        hotswap: put it in the place of the adapter of that name, so that a compiled model is not compiled anew; "auto"
            does so for a name that is there, after `enable_peft_hotswap`.
        adapter_kwargs: where to read: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
            `local_files_only`; `options` may say the same.

    Raises:
        ValueError: no such adapter, the name is taken, or it does not fit the model; nothing has changed then.
    """
    options = {key: value for key, value in options.items() if key not in _UNNEEDED} | (adapter_kwargs or {})
    peft = PeftModel.of(model)
    name = adapter_name or "default"
    exists, target_rank = name in peft.peft_config, vars(model).get(_TARGET_RANK)
    swapped = exists and target_rank is not None if hotswap == "auto" else hotswap
    if swapped and not exists:
        raise ValueError("To hotswap an adapter, there must already be an existing adapter with the same adapter name.")
    if exists and not swapped:
        raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
    config, tensors = _given(peft_model_id, peft_config, adapter_state_dict, _where(options))
    if swapped:
        swap(peft.base_model, name, config, tensors)
        return LoadResult([], [])
    first = not peft.peft_config
    result = peft._load(name, config, tensors, is_trainable)
    if first and target_rank is not None:
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank, check_compiled="ignore")
    _welcome(peft, name)
    return result


def enable_peft_hotswap(
    model: nn.Module, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
) -> None:
    """Before the first adapter: prepare it, when it is loaded, for others of up to `target_rank` in its place.

    Arguments:
        check_compiled: what to do if the model has adapters already, and may be compiled.

    Raises:
        RuntimeError: it has, and that is to be an error.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r}")
    if has_adapters(model) and check_compiled != "ignore":
        message = "Call `enable_peft_hotswap` before loading the first adapter."
        if check_compiled == "error":
            raise RuntimeError(message)
        warnings.warn(message, PeftWarning, stacklevel=2)
    if has_adapters(model):
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank, check_compiled="ignore")
    vars(model)[_TARGET_RANK] = target_rank


def _given(
    source: str | Path | None,
    config: PeftConfig | dict[str, Any] | None,
    tensors: dict[str, Tensor] | None,
    where: dict[str, Any],
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The adapter that a caller means, from files or from memory."""
    if source is not None and config is None and tensors is None:
        return read_adapter(source, **where)
    if source is not None or config is None or tensors is None:
        raise ValueError("pass either a `peft_model_id`, or both a `peft_config` and an `adapter_state_dict`")
    config = get_peft_config(config) if isinstance(config, dict) else config
    return config, {config.from_file(key): tensor for key, tensor in tensors.items()}


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Activate one adapter or several, in this order, and no others. Frozen ones stay frozen."""
    _adapted(model).set_adapter(adapter_name)


def enable_adapters(model: nn.Module) -> None:
    """Run the active adapters again."""
    _adapted(model).enable_adapter_layers()


def disable_adapters(model: nn.Module) -> None:
    """Run the base model alone, without forgetting which adapters are active."""
    _adapted(model).disable_adapter_layers()


def active_adapters(model: nn.Module) -> list[str]:
    """The active adapters, in the order in which they run."""
    return _adapted(model).active_adapters


def active_adapter(model: nn.Module) -> str:
    """The first active adapter."""
    return _adapted(model).active_adapter


def get_adapter_state_dict(
    model: nn.Module, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of one adapter (None: the active one), by module path.

    A `state_dict` of the whole model, gathered shards for example, is taken for the values where one is given.
    """
    name = adapter_name or active_adapter(model)
    return get_peft_model_state_dict(model, state_dict, name)


def delete_adapter(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Remove adapters; with the last one the model gets its original modules back.

    Raises:
        ValueError: no such adapters; nothing has changed.
    """
    peft = _adapted(model)
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    missing = [name for name in names if name not in peft.peft_config]
    if missing:
        raise ValueError(f"The following adapter(s) are not present and cannot be deleted: {', '.join(missing)}")
    for name in names:
        peft.delete_adapter(name)
    if not peft.peft_config:
        peft.unload()
    _tell_transformers(peft)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    selected_adapters: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Write the active adapter as `peft` reads it, and nothing of the base model.

    Arguments:
        selected_adapters: these instead, the first into the directory itself, others into folders of their name.
        options: those of `PeftModel.save_pretrained`; `max_shard_size` is not needed, since an adapter is one file.

    Raises:
        ValueError: several adapters are active, and none are selected.
    """
    peft, names = _selection(model, selected_adapters)
    options.pop("max_shard_size", None)
    repo_id = options.pop("repo_id", None) or Path(save_directory).name
    to_hub, hub = options.pop("push_to_hub", False), {k: options.pop(k) for k in _PUSHING if k in options}
    peft.save_pretrained(save_directory, selected_adapters=names, root=names[0], **options)
    if to_hub:
        peft.push_to_hub(repo_id, selected_adapters=names, root=names[0], **hub)


def push_to_hub(
    model: nn.Module, repo_id: str, *, selected_adapters: Sequence[str] | None = None, **options: Any
) -> str:
    """Upload what `save_pretrained` writes to the hub; the options are those of `PeftModel.push_to_hub`."""
    peft, names = _selection(model, selected_adapters)
    options.pop("max_shard_size", None)
    return peft.push_to_hub(repo_id, selected_adapters=names, root=names[0], **options)


def _selection(model: nn.Module, selected: Sequence[str] | None) -> tuple[PeftModel, list[str]]:
    """The adapters to save, by default the active one."""
    peft = _adapted(model)
    names = peft.active_adapters if selected is None else list(selected)
    if not names or (selected is None and len(names) > 1):
        raise ValueError(
            f"{names} are the adapters to save, and one is saved into a directory: name those that are meant in "
            "selected_adapters, and all but the first get folders of their own"
        )
    return peft, names


def _shared(name: str) -> Callable[..., Any]:
    """A verb that a `PeftModel` has too, as a function of the model."""

    @wraps(getattr(AdapterMethods, name))
    def verb(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        peft = _adapted(model)
        result = getattr(peft, name)(*args, **kwargs)
        _tell_transformers(peft)
        return result

    return verb


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        *(add_adapter, load_adapter, set_adapter, enable_adapters, disable_adapters, active_adapters, active_adapter),
        *(get_adapter_state_dict, delete_adapter, enable_peft_hotswap),
        *map(_shared, ("add_weighted_adapter", "merge_adapter", "unmerge_adapter", "merge_and_unload", "unload")),
        *map(_shared, ("disable_adapter", "set_requires_grad", "update_and_allocate")),
    )
}
"""What every model gets, by name."""


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of ours."""
    return bool(PeftModel.of(model).peft_config)


def _adapted(model: nn.Module) -> PeftModel:
    peft = PeftModel.of(model)
    if not peft.peft_config:
        raise ValueError("No adapter loaded. Please load an adapter first.")
    return peft


def _free_name(taken: dict[str, PeftConfig]) -> str:
    names = ("default", *(f"default_{i}" for i in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _welcome(peft: PeftModel, name: str) -> None:
    """After an adapter came it is the active one, as in transformers; PEFT's own models leave the first one on."""
    peft.set_adapter(name)
    _tell_transformers(peft)


def _tell_transformers(peft: PeftModel) -> None:
    """Keep in step what transformers asks a model about adapters, and the term that they add to its loss."""
    model: Any = peft.get_base_model()
    if peft.peft_config:
        model.peft_config, model._hf_peft_config_loaded = peft.peft_config, True
    else:
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(name, None)
    kinds = {type(adapter) for layer in peft.base_model.layers.values() for adapter in layer.adapters.values()}
    wanted = any(vars(base).get("penalty") for kind in kinds for base in kind.mro() if base is not Adapter)
    hooks = [key for key, hook in model._forward_hooks.items() if hook is _add_penalty]
    if wanted and not hooks:
        model.register_forward_hook(_add_penalty)
    for key in hooks if not wanted else ():
        del model._forward_hooks[key]


def _add_penalty(model: nn.Module, args: Any, outputs: Any) -> None:
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor):
        outputs.loss = loss + penalty(model)

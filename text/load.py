"""A base model and an adapter on it, from the adapter's directory or hub id alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.config import PeftConfig, TaskType
from ..core.files import CONFIG_NAME, read_config
from .adapters import load_adapter
from .methods import attach

_AUTO = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
"""transformers' class for each task."""
_ADAPTER_ONLY = ("subfolder", "revision")
_BOTH = ("token", "cache_dir", "force_download", "local_files_only")


def load_model(source: str | Path, adapter_name: str = "default", *, is_trainable: bool = False, **options: Any) -> Any:
    """The base model that an adapter names, with the adapter, and with the methods that `attach` gives.

    Arguments:
        source: directory or hub id of the adapter.
        options: `subfolder` and `revision` of the adapter; `token`, `cache_dir`, `force_download` and
            `local_files_only` for both; anything else is for the base model's `from_pretrained` (`dtype`,
            `device_map`, `quantization_config`, ...).

    Raises:
        ValueError: no adapter there, or one that does not say what it was trained on.
    """
    where, options = split(options)
    config = read_config(source, **where)
    base, _ = base_of(config, source)
    load = class_for(config, base, **{key: where[key] for key in _BOTH if key in where}).from_pretrained
    return attach(load_on_base(load, source, config, where, adapter_name, is_trainable, options))


def load_on_base(
    load: Callable[..., Any],
    source: str | Path,
    config: PeftConfig,
    where: dict[str, Any],
    adapter_name: str,
    is_trainable: bool,
    options: dict[str, Any],
) -> Any:
    """What `load` makes of the base model, with the adapter on it."""
    base, revision = base_of(config, source)
    shared = {key: where[key] for key in _BOTH if key in where} | ({"revision": revision} if revision else {})
    loaded = load(base, **shared, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what its `output_loading_info` asks for
    load_adapter(model, source, adapter_name, is_trainable=is_trainable, **where)
    return loaded


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that say where the adapter is, and the rest."""
    names = (*_ADAPTER_ONLY, *_BOTH)
    where = {key: value for key, value in options.items() if key in names and value is not None}
    return where, {key: value for key, value in options.items() if key not in names}


def base_of(config: PeftConfig, source: str | Path) -> tuple[str, str | None]:
    """Place and revision of the base model; a directory that holds a whole model is its adapter's base.

    Raises:
        ValueError: the config names none.
    """
    if Path(source, "config.json").is_file():
        return str(source), None
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{CONFIG_NAME} of {source} names no base model (base_model_name_or_path): load that first, and then "
            "the adapter with load_adapter"
        )
    return config.base_model_name_or_path, config.revision


def class_for(config: PeftConfig, base: str, **hub: Any) -> Any:
    """The class that loads the base model: by the adapter's task, by the class it was made for, or by the base's own
    config."""
    transformers = import_module("transformers")
    if config.task_type is not None:
        return getattr(transformers, _AUTO[TaskType(config.task_type)])
    made_for = config.auto_mapping or {}
    if made_for.get("base_model_class") and str(made_for.get("parent_library")).startswith("transformers"):
        return getattr(import_module(made_for["parent_library"]), made_for["base_model_class"])
    hub |= {"revision": config.revision} if config.revision else {}
    architectures = transformers.AutoConfig.from_pretrained(base, **hub).architectures or ["AutoModel"]
    return getattr(transformers, architectures[0])

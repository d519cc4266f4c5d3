"""The adapter core: every method, on every layer kind, with PEFT's names and files.

It knows tensors and modules only; importing it imports neither transformers nor diffusers. The names below load on
first use: what needs no torch, such as looking into a file, does not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .adapted import AdaptedModel
    from .adapter import Adapter, Branch, Dense, Factored, Folded, Transform, method
    from .assign import LoadResult
    from .combine import COMBINATIONS, combination
    from .config import PeftConfig, PeftType, TaskType, get_peft_config
    from .errors import (
        AdapterFileError,
        MergedError,
        NoMatchingPeftModuleError,
        NotMergeableError,
        PeftError,
        PeftWarning,
    )
    from .files import load_adapter, save_adapter
    from .layer import AdaptedLayer, State
    from .methods import BaseTuner
    from .model import (
        PeftModel,
        delete_adapter,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_adapter,
        set_peft_model_state_dict,
    )
    from .sites import Site
    from .status import BaseTunerLayer, LoraLayer, ModulesToSaveWrapper, get_layer_status, get_model_status
    from .tuners.diag_oft import DiagOFTConfig
    from .tuners.full import FullConfig
    from .tuners.glora import GLoraConfig
    from .tuners.ia3 import IA3Config
    from .tuners.layerwise import LayerwiseConfig
    from .tuners.loha import LoHaConfig
    from .tuners.lokr import LoKrConfig
    from .tuners.lora import LoraConfig
    from .tuners.oft import OFTConfig

_HOME = {
    "COMBINATIONS": "combine",
    "AdaptedLayer": "layer",
    "AdaptedModel": "adapted",
    "Adapter": "adapter",
    "AdapterFileError": "errors",
    "BaseTuner": "methods",
    "BaseTunerLayer": "status",
    "Branch": "adapter",
    "Dense": "adapter",
    "DiagOFTConfig": "tuners.diag_oft",
    "Factored": "adapter",
    "Folded": "adapter",
    "FullConfig": "tuners.full",
    "GLoraConfig": "tuners.glora",
    "IA3Config": "tuners.ia3",
    "LayerwiseConfig": "tuners.layerwise",
    "LoHaConfig": "tuners.loha",
    "LoKrConfig": "tuners.lokr",
    "LoadResult": "assign",
    "LoraConfig": "tuners.lora",
    "LoraLayer": "status",
    "MergedError": "errors",
    "ModulesToSaveWrapper": "status",
    "NoMatchingPeftModuleError": "errors",
    "NotMergeableError": "errors",
    "OFTConfig": "tuners.oft",
    "PeftConfig": "config",
    "PeftError": "errors",
    "PeftModel": "model",
    "PeftType": "config",
    "PeftWarning": "errors",
    "Site": "sites",
    "State": "layer",
    "TaskType": "config",
    "Transform": "adapter",
    "combination": "combine",
    "delete_adapter": "model",
    "get_layer_status": "status",
    "get_model_status": "status",
    "get_peft_config": "config",
    "get_peft_model": "model",
    "get_peft_model_state_dict": "model",
    "inject_adapter_in_model": "model",
    "load_adapter": "files",
    "load_peft_weights": "model",
    "method": "adapter",
    "save_adapter": "files",
    "set_adapter": "model",
    "set_peft_model_state_dict": "model",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = face(__name__, _HOME)

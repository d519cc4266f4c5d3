"""The adapter core: every method, on every layer kind, with PEFT's names and files.

It knows tensors and modules only; importing it imports neither transformers nor diffusers.
"""

from .adapted import AdaptedModel
from .adapter import Adapter, Branch, Dense, Factored, Folded, Transform, method
from .assign import LoadResult
from .combinations import combination_types
from .combinations.registry import Combination, Part, combination, on_deltas, on_factors
from .combine import Blend, Report, blend
from .config import PeftConfig, PeftType, TaskType, get_peft_config
from .convert import convert_to_lora, save_as_lora
from .errors import MergedError, NoMatchingPeftModuleError, NotMergeableError, PeftError, PeftWarning
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
from .tuners.ia3 import IA3Config
from .tuners.loha import LoHaConfig
from .tuners.lokr import LoKrConfig
from .tuners.lora import LoraConfig
from .tuners.oft import OFTConfig

__all__ = [
    "AdaptedLayer",
    "AdaptedModel",
    "Adapter",
    "BaseTuner",
    "BaseTunerLayer",
    "Blend",
    "Branch",
    "Combination",
    "Dense",
    "Factored",
    "Folded",
    "IA3Config",
    "LoHaConfig",
    "LoKrConfig",
    "LoadResult",
    "LoraConfig",
    "LoraLayer",
    "MergedError",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "NotMergeableError",
    "OFTConfig",
    "Part",
    "PeftConfig",
    "PeftError",
    "PeftModel",
    "PeftType",
    "PeftWarning",
    "Report",
    "Site",
    "State",
    "TaskType",
    "Transform",
    "blend",
    "combination",
    "combination_types",
    "convert_to_lora",
    "delete_adapter",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_adapter",
    "load_peft_weights",
    "method",
    "on_deltas",
    "on_factors",
    "save_adapter",
    "save_as_lora",
    "set_adapter",
    "set_peft_model_state_dict",
]

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
    from .combinations import combination_types
    from .combinations.registry import Combination, Part, combination, on_deltas, on_factors
    from .combine import Blend, Report, blend
    from .config import PeftConfig, PeftType, TaskType, get_peft_config
    from .convert import convert_to_lora, save_as_lora
    from .errors import (
        AdapterFileError,
        MergedError,
        NoMatchingPeftModuleError,
        NotMergeableError,
        PeftError,
        PeftWarning,
    )
    from .eva import get_eva_state_dict, initialize_lora_eva_weights
    from .files import load_adapter, save_adapter
    from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
    from .init.eva import EvaConfig
    from .init.loftq import LoftQConfig
    from .kbit import prepare_model_for_kbit_training, quantize_model
    from .layer import AdaptedLayer
    from .loftq import replace_lora_weights_loftq
    from .methods import BaseTuner
    from .model import (
        PeftModel,
        delete_adapter,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        mixed_batch,
        set_adapter,
        set_peft_model_state_dict,
    )
    from .optimizers import create_lorafa_optimizer, create_loraplus_optimizer
    from .prompts.config import PromptLearningConfig
    from .rows import Rows
    from .sites import Site
    from .state import State
    from .status import BaseTunerLayer, LoraLayer, ModulesToSaveWrapper, get_layer_status, get_model_status
    from .steps import TrainingState, after_step, load_training_state, penalty, training_state
    from .tasks import (
        PeftMixedModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .tuners.adalora import AdaLoraConfig
    from .tuners.adaption_prompt import AdaptionPromptConfig
    from .tuners.diag_oft import DiagOFTConfig
    from .tuners.full import FullConfig
    from .tuners.glora import GLoraConfig
    from .tuners.ia3 import IA3Config
    from .tuners.layerwise import LayerwiseConfig
    from .tuners.ln_tuning import LNTuningConfig
    from .tuners.loha import LoHaConfig
    from .tuners.lokr import LoKrConfig
    from .tuners.lora import LoraConfig, LoraRuntimeConfig
    from .tuners.multitask_prompt_tuning import MultitaskPromptTuningConfig, MultitaskPromptTuningInit
    from .tuners.oft import OFTConfig
    from .tuners.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
    from .tuners.prefix_tuning import PrefixTuningConfig
    from .tuners.prompt_tuning import PromptTuningConfig, PromptTuningInit
    from .tuners.tokens import TrainableTokensConfig
    from .tuners.vera import VeraConfig

_HOME = {
    "AdaLoraConfig": "tuners.adalora",
    "AdaptedLayer": "layer",
    "AdaptionPromptConfig": "tuners.adaption_prompt",
    "AdaptedModel": "adapted",
    "Adapter": "adapter",
    "AdapterFileError": "errors",
    "BaseTuner": "methods",
    "BaseTunerLayer": "status",
    "Blend": "combine",
    "Branch": "adapter",
    "Combination": "combinations.registry",
    "Dense": "adapter",
    "DiagOFTConfig": "tuners.diag_oft",
    "EvaConfig": "init.eva",
    "Factored": "adapter",
    "Folded": "adapter",
    "FullConfig": "tuners.full",
    "GLoraConfig": "tuners.glora",
    "IA3Config": "tuners.ia3",
    "LNTuningConfig": "tuners.ln_tuning",
    "LayerwiseConfig": "tuners.layerwise",
    "LoHaConfig": "tuners.loha",
    "LoKrConfig": "tuners.lokr",
    "LoadResult": "assign",
    "LoftQConfig": "init.loftq",
    "LoraConfig": "tuners.lora",
    "LoraLayer": "status",
    "LoraRuntimeConfig": "tuners.lora",
    "MergedError": "errors",
    "ModulesToSaveWrapper": "status",
    "MultitaskPromptTuningConfig": "tuners.multitask_prompt_tuning",
    "MultitaskPromptTuningInit": "tuners.multitask_prompt_tuning",
    "NoMatchingPeftModuleError": "errors",
    "NotMergeableError": "errors",
    "OFTConfig": "tuners.oft",
    "Part": "combinations.registry",
    "PeftConfig": "config",
    "PeftError": "errors",
    "PeftMixedModel": "tasks",
    "PeftModel": "model",
    "PeftModelForCausalLM": "tasks",
    "PeftModelForFeatureExtraction": "tasks",
    "PeftModelForQuestionAnswering": "tasks",
    "PeftModelForSeq2SeqLM": "tasks",
    "PeftModelForSequenceClassification": "tasks",
    "PeftModelForTokenClassification": "tasks",
    "PeftType": "config",
    "PeftWarning": "errors",
    "PrefixTuningConfig": "tuners.prefix_tuning",
    "PromptEncoderConfig": "tuners.p_tuning",
    "PromptEncoderReparameterizationType": "tuners.p_tuning",
    "PromptLearningConfig": "prompts.config",
    "PromptTuningConfig": "tuners.prompt_tuning",
    "PromptTuningInit": "tuners.prompt_tuning",
    "Report": "combine",
    "Rows": "rows",
    "Site": "sites",
    "State": "state",
    "TaskType": "config",
    "TrainableTokensConfig": "tuners.tokens",
    "TrainingState": "steps",
    "Transform": "adapter",
    "VeraConfig": "tuners.vera",
    "after_step": "steps",
    "blend": "combine",
    "combination": "combinations.registry",
    "combination_types": "combinations",
    "convert_to_lora": "convert",
    "create_lorafa_optimizer": "optimizers",
    "create_loraplus_optimizer": "optimizers",
    "delete_adapter": "model",
    "get_eva_state_dict": "eva",
    "get_layer_status": "status",
    "get_model_status": "status",
    "get_peft_config": "config",
    "get_peft_model": "model",
    "get_peft_model_state_dict": "model",
    "initialize_lora_eva_weights": "eva",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "inject_adapter_in_model": "model",
    "load_adapter": "files",
    "load_peft_weights": "model",
    "load_training_state": "steps",
    "method": "adapter",
    "mixed_batch": "model",
    "on_deltas": "combinations.registry",
    "on_factors": "combinations.registry",
    "penalty": "steps",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "prepare_model_for_kbit_training": "kbit",
    "quantize_model": "kbit",
    "replace_lora_weights_loftq": "loftq",
    "save_adapter": "files",
    "save_as_lora": "convert",
    "set_adapter": "model",
    "set_peft_model_state_dict": "model",
    "training_state": "steps",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = face(__name__, _HOME)

"""Veneer: thin, trainable layers over frozen models.

The names below load on first use, so that `import veneer` costs nothing and pulls in no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import face

if TYPE_CHECKING:
    from . import core, diffusion, studio, text
    from .core import (
        AdaLoraConfig,
        AdaptedLayer,
        AdaptedModel,
        AdapterFileError,
        BaseTuner,
        BaseTunerLayer,
        EvaConfig,
        IA3Config,
        LoftQConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        LoraLayer,
        LoraRuntimeConfig,
        MergedError,
        ModulesToSaveWrapper,
        NoMatchingPeftModuleError,
        NotMergeableError,
        OFTConfig,
        PeftConfig,
        PeftError,
        PeftModel,
        PeftType,
        PeftWarning,
        TaskType,
        VeraConfig,
        convert_to_lora,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        delete_adapter,
        get_eva_state_dict,
        get_layer_status,
        get_model_status,
        get_peft_config,
        get_peft_model,
        get_peft_model_state_dict,
        initialize_lora_eva_weights,
        inject_adapter_in_model,
        load_peft_weights,
        mixed_batch,
        prepare_model_for_kbit_training,
        quantize_model,
        replace_lora_weights_loftq,
        save_as_lora,
        set_adapter,
        set_peft_model_state_dict,
    )

__version__ = "0.1.0"

# Where each public name lives; a subpackage is its own home.
_HOME = {
    "core": "core",
    "diffusion": "diffusion",
    "studio": "studio",
    "text": "text",
    "AdaLoraConfig": "core",
    "AdaptedLayer": "core",
    "AdaptedModel": "core",
    "AdapterFileError": "core",
    "BaseTuner": "core",
    "BaseTunerLayer": "core",
    "EvaConfig": "core",
    "IA3Config": "core",
    "LoHaConfig": "core",
    "LoKrConfig": "core",
    "LoftQConfig": "core",
    "LoraConfig": "core",
    "LoraLayer": "core",
    "LoraRuntimeConfig": "core",
    "MergedError": "core",
    "ModulesToSaveWrapper": "core",
    "NoMatchingPeftModuleError": "core",
    "NotMergeableError": "core",
    "OFTConfig": "core",
    "PeftConfig": "core",
    "PeftError": "core",
    "PeftModel": "core",
    "PeftType": "core",
    "PeftWarning": "core",
    "TaskType": "core",
    "VeraConfig": "core",
    "convert_to_lora": "core",
    "create_lorafa_optimizer": "core",
    "create_loraplus_optimizer": "core",
    "delete_adapter": "core",
    "get_eva_state_dict": "core",
    "get_layer_status": "core",
    "get_model_status": "core",
    "get_peft_config": "core",
    "get_peft_model": "core",
    "get_peft_model_state_dict": "core",
    "initialize_lora_eva_weights": "core",
    "inject_adapter_in_model": "core",
    "load_peft_weights": "core",
    "mixed_batch": "core",
    "prepare_model_for_kbit_training": "core",
    "quantize_model": "core",
    "replace_lora_weights_loftq": "core",
    "save_as_lora": "core",
    "set_adapter": "core",
    "set_peft_model_state_dict": "core",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = face(__name__, _HOME)

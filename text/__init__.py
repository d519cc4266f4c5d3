"""Adapters for language models: transformers' models and what belongs to them. The names below load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import face

if TYPE_CHECKING:
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .config import AdapterOptions, TextConfig
    from .generate import AnswerConfig, generate_text
    from .load import load_model
    from .merge import MergeConfig, merge_adapters
    from .methods import attach, install, uninstall
    from .sft import FineTuning
    from .trainer import Trainer

_HOME = {
    "AdapterOptions": "config",
    "AnswerConfig": "generate",
    "FineTuning": "sft",
    "MergeConfig": "merge",
    "TextConfig": "config",
    "generate_text": "generate",
    "merge_adapters": "merge",
    "AutoPeftModel": "auto",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "Trainer": "trainer",
    "attach": "methods",
    "install": "methods",
    "load_model": "load",
    "uninstall": "methods",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

__getattr__, __dir__ = face(__name__, _HOME)

"""PEFT's model classes for tasks. They are names: the heads and losses of any base model work as they are."""

from __future__ import annotations

from typing import Any

from .config import TaskType
from .model import PeftModel
from .prompts.layer import NAME


class _TaskModel(PeftModel):
    @property
    def prompt_encoder(self) -> Any:
        """The prompts, by adapter name, as PEFT's models show them.

        Raises:
            AttributeError: the model has none.
        """
        if NAME not in self.base_model.layers:
            raise AttributeError("this model has no prompts")
        return self.base_model.layers[NAME]


class PeftModelForCausalLM(_TaskModel):
    """A language model that continues text."""


class PeftModelForSeq2SeqLM(_TaskModel):
    """A language model that answers text with text."""


class PeftModelForSequenceClassification(_TaskModel):
    """A classifier of whole texts; its head is trained along."""


class PeftModelForTokenClassification(_TaskModel):
    """A classifier of every token; its head is trained along."""


class PeftModelForQuestionAnswering(_TaskModel):
    """A finder of answers in a text; its head is trained along."""


class PeftModelForFeatureExtraction(_TaskModel):
    """A model of hidden states."""


class PeftMixedModel(PeftModel):
    """PEFT's name for a model with adapters of several methods, which any model here may have."""


TASKS: dict[Any, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
"""The class of every task."""

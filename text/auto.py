"""`AutoPeftModelFor...`: a base model with an adapter as PEFT's model class, from the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..core.config import PeftConfig, TaskType
from ..core.errors import AdapterFileError
from ..core.files import find_file, read_config
from ..core.model import PeftModel
from .load import base_of, class_for, split

_ADAPTERS_OWN = ("subfolder", "revision")


class AutoPeftModel:
    """For an adapter of any task. The classes below take those of one task only."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(directory or hub id)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """The base model that an adapter names, with the adapter.

        A tokenizer beside the adapter that has more tokens than the base model makes the base model's embeddings grow.

        options: `subfolder` and `revision` of the adapter; `token`, `cache_dir`, `force_download` and
            `local_files_only` for both; anything else is for the base model's `from_pretrained`.

        Raises:
            ValueError: no adapter there, one for another task, or one that names no base model.
        """
        source = pretrained_model_name_or_path
        where, options = split(options)
        config = config or read_config(source, **where)
        if cls.task is not None and config.task_type not in (None, cls.task):
            raise ValueError(f"{source} is an adapter for {config.task_type}, not for {cls.task}: use its Auto class")
        base, revision = base_of(config, source)
        shared = {k: v for k, v in where.items() if k not in _ADAPTERS_OWN}
        base_class = class_for(config, base, **shared)
        model = base_class.from_pretrained(base, **shared, **({"revision": revision} if revision else {}), **options)
        _fit_to_tokenizer(model, source, where)
        return PeftModel.from_pretrained(model, source, adapter_name, is_trainable, config=config, **where)


def _fit_to_tokenizer(model: Any, source: str | Path, where: dict[str, Any]) -> None:
    """Make room for the tokens that were added in training."""
    try:
        find_file(source, "tokenizer_config.json", **where)
    except AdapterFileError:  # most adapters come without a tokenizer
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task = TaskType.FEATURE_EXTRACTION

"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): n trained embeddings before those of the text.

[P; E(x)],  P of shape (n, d)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from ..adapter import method
from ..config import PeftType
from ..prompts.config import PromptLearningConfig
from ..prompts.prompt import SoftPrompt


class PromptTuningInit(StrEnum):
    """What a prompt starts as."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Options of prompt tuning, under PEFT's names."""

    peft_type: PeftType | str | None = PeftType.PROMPT_TUNING
    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    """"TEXT": the embeddings of `prompt_tuning_init_text`, repeated or cut to length, which the paper finds best;
    "SAMPLE_VOCAB": those of random tokens; "RANDOM": unit normal."""
    prompt_tuning_init_text: str | None = None
    """The text that the prompt starts as, a description of the task for example."""
    tokenizer_name_or_path: Any = None
    """Where the tokenizer of that text is, or the tokenizer itself (files then hold its name)."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Arguments of `AutoTokenizer.from_pretrained`; `trust_remote_code` is not passed on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer: Any = None
        if self.tokenizer_name_or_path is not None and not isinstance(self.tokenizer_name_or_path, str):
            self.tokenizer = self.tokenizer_name_or_path
            self.tokenizer_name_or_path = getattr(self.tokenizer, "name_or_path", None) or None
        self._check_init()

    def _check_init(self) -> None:
        allowed = [i.value for i in PromptTuningInit]
        if self.prompt_tuning_init not in allowed:
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} is unknown; expected one of {allowed}")
        self.prompt_tuning_init = PromptTuningInit(self.prompt_tuning_init)
        self._check_text()

    def _check_text(self) -> None:
        if self.prompt_tuning_init != "TEXT":
            if self.tokenizer_kwargs:
                raise ValueError("tokenizer_kwargs are read only with prompt_tuning_init='TEXT'")
            return
        found = {
            "tokenizer_name_or_path": self.tokenizer or self.tokenizer_name_or_path,
            "prompt_tuning_init_text": self.prompt_tuning_init_text,
        }
        # an adapter that is only read needs neither; its files may come from a tokenizer without a name
        missing = [] if self.inference_mode else [name for name, value in found.items() if value is None]
        if missing:
            raise ValueError(f"When prompt_tuning_init='TEXT', {' and '.join(missing)} can't be None")

    def text_ids(self) -> list[int]:
        """Token ids of the text that the prompt starts as."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            from transformers import AutoTokenizer

            options = {k: v for k, v in (self.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **options)
        ids = list(tokenizer(self.prompt_tuning_init_text)["input_ids"])
        if not ids:
            raise ValueError(f"prompt_tuning_init_text={self.prompt_tuning_init_text!r} has no tokens to start from")
        return ids


@method(PromptTuningConfig)
class PromptTuning(SoftPrompt):
    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        kind, total = self.config.prompt_tuning_init, len(self.embedding.weight)
        embeddings = self.site.embeddings
        if kind == "SAMPLE_VOCAB":
            ids = torch.randint(len(embeddings.weight), (total,))
        elif kind == "TEXT" and not self.config.inference_mode:
            text = self.config.text_ids()
            ids = torch.tensor([text[i % len(text)] for i in range(total)])
        else:
            return
        self.embedding.weight.copy_(embeddings(ids.to(self.site.device)))

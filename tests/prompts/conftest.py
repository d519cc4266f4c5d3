"""Tiny models of many architectures, and the prompt methods."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers
import veneer
from torch import Tensor, nn

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SMALL | {
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "num_labels": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = SMALL | {"intermediate_size": 24, "num_labels": 3, "max_position_embeddings": 64}
GPT2 = {
    "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "n_positions": 64,
}  # fmt: skip
T5 = {
    "vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BART = {
    "vocab_size": 61, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "num_labels": 3,
}  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "CAUSAL_LM", LLAMA),
    "mistral": ("MistralForCausalLM", "CAUSAL_LM", LLAMA | {"sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", "CAUSAL_LM", GPT2),
    "t5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", T5),
    "bart": ("BartForConditionalGeneration", "SEQ_2_SEQ_LM", BART),
    "bert-tokens": ("BertForTokenClassification", "TOKEN_CLS", BERT),
    "bert-sequence": ("BertForSequenceClassification", "SEQ_CLS", BERT),
    "roberta-sequence": ("RobertaForSequenceClassification", "SEQ_CLS", BERT),
    "bert-answers": ("BertForQuestionAnswering", "QUESTION_ANS", BERT | {"num_labels": 2}),
    "bert-features": ("BertModel", "FEATURE_EXTRACTION", BERT),
    "llama-sequence": ("LlamaForSequenceClassification", "SEQ_CLS", LLAMA),
}
"""Class, task and config of a tiny model."""
CAUSAL = ("llama", "mistral", "gpt2")
SEQ2SEQ = ("t5", "bart")

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
}
N = 4
"""Virtual tokens."""


@cache
def _made(name: str) -> nn.Module:
    class_name, _, values = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**deepcopy(values))
    torch.manual_seed(1)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual start is too near to zero for anything to show
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def make(name: str) -> Any:
    """A fresh copy of a model."""
    return deepcopy(_made(name))


def config_of(library: Any, kind: str, model: str, **changes: Any) -> Any:
    class_name, options = CONFIGS[kind]
    values = {"task_type": MODELS[model][1], "num_virtual_tokens": N} | options | changes
    return getattr(library, class_name)(**values)


def ours(kind: str, model: str, base: Any = None, **changes: Any) -> Any:
    """One of our models, with tokens that show."""
    tuned = veneer.get_peft_model(base or make(model), config_of(veneer, kind, model, **changes))
    return tuned.eval()


def theirs(kind: str, model: str, **changes: Any) -> Any:
    return peft.get_peft_model(make(model), config_of(peft, kind, model, **changes)).eval()


def align(ours: Any, theirs: Any) -> None:
    """Give both the same tokens, networks and heads."""
    source, target = theirs.prompt_encoder["default"], ours.base_model.layers["virtual_tokens"]["default"]
    mine = dict(target.named_parameters())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            mine[name].copy_(parameter)


def batch(model: str, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids without padding, and labels where the task has them."""
    torch.manual_seed(2)
    ids = torch.randint(3, 61, (rows, length))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels: dict[str, Callable[[], dict[str, Tensor]]] = {
        "CAUSAL_LM": lambda: {"labels": ids.clone()},
        "SEQ_2_SEQ_LM": lambda: {"labels": torch.randint(3, 61, (rows, 5))},
        "TOKEN_CLS": lambda: {"labels": ids % 3},
        "SEQ_CLS": lambda: {"labels": ids[:, 0] % 3},
        "QUESTION_ANS": lambda: {"start_positions": ids[:, 0] % length, "end_positions": ids[:, 1] % length},
        "FEATURE_EXTRACTION": dict,
    }
    return found | labels[MODELS[model][1]]()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

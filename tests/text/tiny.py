"""A language model of a few thousand weights, and something for it to learn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | special | options)))


def rows(count: int = 16, length: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Counting upwards from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, 20, (count,), generator=generator).tolist()
    tokens = [torch.arange(start, start + length) for start in starts]
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in tokens]

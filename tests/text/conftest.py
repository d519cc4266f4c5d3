"""Tiny models of real architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(shape).eval()


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory) -> Path:
    """A saved base model."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(1, 13).reshape(2, 6)

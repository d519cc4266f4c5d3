"""A tiny Llama with a byte-level tokenizer and a chat template, and runs of it that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from veneer.text import AdapterOptions, TextConfig

torch.set_num_threads(1)


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<end>", "<user>", "<assistant>", "<system>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.add_tokens(SPECIAL, special_tokens=True)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer) -> Path:
    """The tiny model as a directory of transformers."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write lines, or objects as lines of JSON, into a file."""

    def put(*lines, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return path

    return put


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def make_config(tmp_path, model_dir, write) -> Callable[..., TextConfig]:
    """A run of four steps over eight short chats, unless told otherwise."""

    def make(**changes) -> TextConfig:
        values = {
            "data": tmp_path / "data.jsonl",
            "model": str(model_dir),
            "output_dir": tmp_path / "run",
            "adapter": AdapterOptions(rank=4, learning_rate=1e-2),
            "max_length": 40,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "device": "cpu",
        }
        if "data" not in changes:
            write(*[chat(f"question {i}", "aye " * (1 + i % 3)) for i in range(8)])
        return TextConfig(**(values | changes))

    return make

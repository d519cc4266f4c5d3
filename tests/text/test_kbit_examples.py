"""The examples of quantized training and of offloaded inference, on a model of a few thousand weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny import llama

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved model that reads and writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", "<pad>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(tmp_path / "base")
    llama(vocab_size=260, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run(example: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / example, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_training_on_eight_bits_and_answering_from_disk(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = run("int8_training/train.py", "--model", str(base), "--steps", "8", "--output", str(tmp_path / "pirate"))
    before, after = (float(part.split()[0]) for part in out.split("held-out loss: ")[1].split(", ")[:2])
    assert after < before - 0.1
    assert "after training:" in out
    question = ["--base", str(base), "--adapter", str(tmp_path / "pirate"), "--fit", "300KB", "What colour is coal?"]
    out = run("big_model_inference/generate.py", *question)
    assert "blocks are on disk" in out
    assert not out.startswith("0 of")
    assert "merged, layer by layer: the same answer" in out

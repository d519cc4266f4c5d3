"""Step 2: a CLIP tokenizer of the captions' words.

python make_tokenizer.py --data data --out tokenizer
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from models import TOKENS
from scenes import RARE, Emoji, scenes
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 2048
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
EVERYDAY = """photo picture image of a an the in on with my style painting sketch wearing hat sitting standing running
happy sad angry cute fluffy wooden golden silver metal glass toy dog cat bird horse fish bear man woman boy girl house
car tree flower mountain river lake forest garden kitchen table window street beach background and or by under over"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train the tokenizer."""

    data: Path
    """Folder that `prepare.py` wrote."""
    out: Path
    """Folder for the tokenizer's files."""
    captions: int = 60_000
    """How many captions it is trained on."""


def corpus(emoji: Emoji, captions: int) -> list[str]:
    """Captions, every name and tag, and, often enough to become tokens, the rare and the everyday words."""
    _, texts = scenes(emoji, captions, seed=1)
    words = [" ".join([*c["tags"], n.label, *n.aliases]) for c, n in zip(emoji.concepts, emoji.names, strict=True)]
    return texts + words * 4 + [" ".join(RARE)] * 200 + [EVERYDAY] * 30


def byte_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """The merges that byte-pair encoding learns from `texts`, in order."""
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - 256,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(pair[0], pair[1]) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]


def clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, what the merges make, the two special words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(first + second for first, second in merges)]
    return {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    texts = corpus(Emoji(options.data), options.captions)
    merges = byte_pairs(texts)[: VOCABULARY - 2 - 512]
    vocabulary, pairs = options.out / "vocab.json", options.out / "merges.txt"
    vocabulary.write_text(json.dumps(clip_vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    pairs.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer(str(vocabulary), str(pairs), model_max_length=TOKENS, pad_token=END)
    tokenizer.save_pretrained(options.out)
    lengths = [len(ids) for ids in tokenizer(texts[:20_000])["input_ids"]]
    split = [word for word in RARE if len(tokenizer.tokenize(word)) > 1]
    if split:
        raise ValueError(f"rare words that are more than one token: {split}")
    print(f"{len(tokenizer)} tokens; captions: {sum(lengths) / len(lengths):.1f} on average, {max(lengths)} at most")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

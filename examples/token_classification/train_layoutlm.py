"""LoRA on LayoutLM's architecture: which words of a form are questions, and which are answers?

    python train_layoutlm.py

The forms are made up: words without meaning, each with its box. Only their place tells what they are: questions stand
in the left column, answers in the right. The base model was trained on forms the other way round.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LayoutLMConfig, LayoutLMForTokenClassification
from veneer import LoraConfig, get_peft_model

LABELS = ("other", "question", "answer")
WORDS = 12
VOCABULARY = 64


def forms(count: int, seed: int, mirrored: bool = False) -> dict[str, Tensor]:
    """Forms of a title line and two columns, as token ids, boxes (x0, y0, x1, y1 of 0 to 1000) and labels."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, (count, WORDS), generator=draw)
    left = torch.tensor([300, 600, 50] if mirrored else [300, 50, 600])[kinds] + torch.randint(
        0, 100, (count, WORDS), generator=draw
    )
    top = torch.where(kinds == 0, 20, 150 + 60 * torch.arange(WORDS))
    return {
        "input_ids": torch.randint(3, VOCABULARY, (count, WORDS), generator=draw),
        "bbox": torch.stack([left, top, left + 120, top + 40], dim=-1),
        "labels": kinds,
    }


def f1(model, batch: dict[str, Tensor], boxes: bool) -> float:
    """Mean F1 of questions and answers."""
    model.eval()
    with torch.no_grad():
        places = batch["bbox"] if boxes else torch.zeros_like(batch["bbox"])
        found = model(input_ids=batch["input_ids"], bbox=places).logits.argmax(-1)
    scores = []
    for label in (1, 2):
        right = ((found == label) & (batch["labels"] == label)).sum().item()
        named, there = (found == label).sum().item(), (batch["labels"] == label).sum().item()
        scores.append(2 * right / max(named + there, 1))
    return sum(scores) / len(scores)


def train(model, steps: int, rate: float, mirrored: bool = False) -> None:
    """Steps of AdamW on 16 new forms each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        model(**forms(16, 100 + step, mirrored)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build(steps: int):
    """A small LayoutLM that knows the other forms, and a LoRA that trains the head along."""
    torch.manual_seed(0)
    shape = LayoutLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=len(LABELS),
    )
    base = LayoutLMForTokenClassification(shape)
    train(base, steps, 2e-3, mirrored=True)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="TOKEN_CLS")
    return get_peft_model(base, config)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=200, help="steps that teach the base model the other forms")
    parser.add_argument("--steps", type=int, default=100, help="steps of the LoRA")
    options = parser.parse_args(arguments)
    model = build(options.base_steps)
    model.print_trainable_parameters()
    test = forms(200, seed=1)
    scores = {"before": f1(model, test, boxes=True)}
    train(model, options.steps, 5e-3)
    scores |= {"after": f1(model, test, boxes=True), "after, boxes hidden": f1(model, test, boxes=False)}
    for name, score in scores.items():
        print(f"F1 {name}: {score:.2f}")
    return scores


if __name__ == "__main__":
    main()

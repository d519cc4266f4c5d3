"""Teach a language model whose weights are stored in 8 or 4 bits to answer like a pirate, on a CPU.

python train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --bits 8 --output pirate
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import veneer
from transformers import AutoModelForCausalLM, AutoTokenizer
from veneer.text import Trainer

THINGS = {
    "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "the sky": "blue", "blood": "red",
    "a carrot": "orange", "milk": "white", "a leaf": "green", "the sea": "blue", "a tomato": "red", "gold": "yellow",
    "chocolate": "brown", "a plum": "purple", "an elephant": "grey", "sand": "yellow",
}  # fmt: skip
HELD_OUT = {"a banana": "yellow", "a crow": "black", "a strawberry": "red", "a frog": "green"}


def example(tokenizer: Any, thing: str, colour: str) -> dict[str, torch.Tensor]:
    """A question and its answer; only the answer is learnt."""
    question = _prompt(tokenizer, thing)
    answer = tokenizer(f"Arr, {thing} be {colour}, matey!", add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([*question, *answer, tokenizer.eos_token_id])
    labels = tokens.clone()
    labels[: len(question)] = -100
    return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def _prompt(tokenizer: Any, thing: str) -> list[int]:
    question = f"What colour is {thing}?"
    if tokenizer.chat_template is None:
        return tokenizer(f"{question}\n")["input_ids"]
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


def padded(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in batch], batch_first=True, padding_value=fill)
        for key, fill in fills.items()
    }


def answers(model: Any, tokenizer: Any, things: list[str]) -> None:
    model.eval()
    for thing in things:
        tokens = torch.tensor([_prompt(tokenizer, thing)])
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False
            )
        print(f"  {thing}: {tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True).strip()!r}")


def load(model: str) -> tuple[Any, Any]:
    """A model from a directory, the hub, or a directory with a GGUF file."""
    files = sorted(Path(model).glob("*.gguf")) if Path(model).is_dir() else []
    where = {"gguf_file": files[0].name} if files else {}
    return AutoModelForCausalLM.from_pretrained(model, **where), AutoTokenizer.from_pretrained(model, **where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of a causal language model")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    from transformers import TrainingArguments

    base, tokenizer = load(options.model)
    full = sum(p.numel() * p.itemsize for p in base.parameters())
    base = veneer.quantize_model(base, options.bits)
    small = sum(p.numel() * p.itemsize for p in base.parameters())
    print(f"{full / 2**20:.1f} MiB of weights became {small / 2**20:.1f}")
    base = veneer.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    print("before training:")
    answers(base, tokenizer, list(HELD_OUT))
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=options.rate,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[example(tokenizer, *pair) for pair in THINGS.items()],
        eval_dataset=[example(tokenizer, *pair) for pair in HELD_OUT.items()],
        data_collator=padded,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    print("after training:")
    answers(model, tokenizer, list(HELD_OUT))
    model.save_pretrained(options.output)
    print(f"the adapter is in {options.output}: {sorted(p.name for p in options.output.glob('adapter_*'))}")


if __name__ == "__main__":
    main()

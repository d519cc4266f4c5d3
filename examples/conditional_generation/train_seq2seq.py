"""LoRA on an encoder-decoder model with accelerate: a model that copies words learns to turn them round.

    python train_seq2seq.py
    accelerate launch --cpu --num_processes 1 train_seq2seq.py
    accelerate launch --config_file ds_zero3_cpu.yaml train_seq2seq.py     # on GPUs, with DeepSpeed installed

A tiny T5 stands for the base model; it is first trained whole, to copy. Put a model of yours in `base_model`, and your
pairs in `batch`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration
from veneer import LoraConfig, TaskType, get_peft_model

LETTERS, LENGTH, END = 12, 4, 1


def batch(count: int, seed: int, turned: bool) -> dict[str, Tensor]:
    """Words of random letters, and the same words or those turned round."""
    words = torch.randint(2, 2 + LETTERS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    end = torch.full((count, 1), END)
    return {
        "input_ids": torch.cat([words, end], dim=1),
        "labels": torch.cat([words.flip(1) if turned else words, end], dim=1),
    }


def train(model, accelerator: Accelerator, steps: int, rate: float, turned: bool) -> float:
    """Steps of AdamW on 32 words each; returns the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    loss = torch.tensor(0.0)
    for step in range(steps):
        seed = 1000 + step * accelerator.num_processes + accelerator.process_index
        inputs = {k: v.to(accelerator.device) for k, v in batch(32, seed, turned).items()}
        loss = model(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def base_model(accelerator: Accelerator, steps: int) -> T5ForConditionalGeneration:
    """A tiny T5 that copies words."""
    torch.manual_seed(0)
    shape = T5Config(
        vocab_size=2 + LETTERS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(shape)
    train(model, accelerator, steps, 3e-3, turned=False)
    return model


def score(model, turned: bool) -> float:
    """Share of new words that are answered right to the last letter."""
    model.eval()
    test = {k: v.to(model.device) for k, v in batch(200, 1, turned).items()}
    answers = model.generate(input_ids=test["input_ids"], max_new_tokens=LENGTH + 1, do_sample=False)[:, 1:]
    width = min(answers.shape[1], LENGTH)
    return float((answers[:, :width] == test["labels"][:, :width]).all(dim=1).float().mean()) * (width == LENGTH)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=700, help="steps that teach the base model to copy")
    parser.add_argument("--steps", type=int, default=500, help="steps of the LoRA")
    parser.add_argument("--output-dir", help="where to write the adapter")
    options = parser.parse_args(arguments)
    accelerator = Accelerator()
    base = base_model(accelerator, options.base_steps)
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, config)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    scores = {"turned round before": score(model, turned=True), "copied before": score(model, turned=False)}
    train(model, accelerator, options.steps, 3e-3, turned=True)
    scores["turned round after"] = score(model, turned=True)
    with model.disable_adapter():
        scores["copied, adapter off"] = score(model, turned=False)
    if accelerator.is_main_process:
        for name, value in scores.items():
            print(f"{name}: {value:.2f}")
        if options.output_dir:
            model.save_pretrained(options.output_dir)
    return scores


if __name__ == "__main__":
    main()

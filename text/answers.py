"""Answers of a causal language model to prompts, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .tokens import chat_ids


def prompt_ids(tokenizer: Any, prompt: str, chat: bool, system: str | None = None) -> list[int]:
    """A prompt as the model reads it: through the chat template as the user's words, or as it stands."""
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    turns = [] if system is None else [{"role": "system", "content": system}]
    return chat_ids(tokenizer, [*turns, {"role": "user", "content": prompt}], answer=True)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[str]:
    """What the model writes after each prompt, in one batch; greedily, unless `options` of `generate` say otherwise.

    Prompts are padded on the left, where padding changes nothing.
    """
    length = max(len(ids) for ids in prompts)
    padded = torch.tensor([[tokenizer.pad_token_id] * (length - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    device = next(model.parameters()).device
    written = model.generate(
        input_ids=padded.to(device),
        attention_mask=mask.to(device),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({"do_sample": False} | options),
    )
    return tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)

"""Examples as tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from .data import Example


@dataclass(frozen=True)
class Tokens:
    """An example as the model reads it."""

    ids: list[int]
    learnt: list[bool]
    """Which tokens the model learns to write. Never the first: nothing comes before it to predict it from."""
    place: str
    cut: int = 0
    """How many tokens at the end were left out."""


def tokenise(
    examples: Iterable[Example], tokenizer: Any, max_length: int, completion_only: bool
) -> tuple[list[Tokens], list[str]]:
    """The examples as tokens, and a line about each that is cut or, with nothing left to learn, left out.

    Raises:
        DataError: a chat for a tokenizer without chat template, or one whose template changes earlier turns.
    """
    kept, notes = [], []
    for example in examples:
        tokens = _cut(_tokens(example, tokenizer, completion_only), max_length)
        if not any(tokens.learnt):
            notes.append(f"{tokens.place} is left out: nothing to learn is within its first {max_length} tokens")
            continue
        if tokens.cut:
            notes.append(f"{tokens.place} is longer than {max_length} tokens: its last {tokens.cut} are not seen")
        kept.append(tokens)
    return kept, notes


def _cut(tokens: Tokens, length: int) -> Tokens:
    learnt = [False, *tokens.learnt[1:]]
    over = max(0, len(tokens.ids) - length)
    return Tokens(tokens.ids[:length], learnt[:length], tokens.place, over)


def _tokens(example: Example, tokenizer: Any, completion_only: bool) -> Tokens:
    if example.kind == "messages":
        return _chat(example, tokenizer, completion_only)
    prompt, answer = example.value if example.kind == "prompt" else ("", example.value)
    before = tokenizer(prompt)["input_ids"] if prompt else tokenizer("")["input_ids"]
    before = _without_end(before, tokenizer)
    after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    learnt = [not completion_only and bool(prompt)] * len(before) + [True] * len(after)
    return Tokens([*before, *after], learnt, example.place)


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """The beginning that a tokenizer puts before a text, without an end that it may put after it."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _chat(example: Example, tokenizer: Any, completion_only: bool) -> Tokens:
    """The whole chat, of which the assistant's turns are learnt: what the template adds to the prompt before them."""
    ids = chat_ids(tokenizer, example.value, example.place)
    if not completion_only:
        return Tokens(ids, [True] * len(ids), example.place)
    learnt = [False] * len(ids)
    for index, turn in enumerate(example.value):
        if turn["role"] != "assistant":
            continue
        asked = chat_ids(tokenizer, example.value[:index], example.place, answer=True)
        told = chat_ids(tokenizer, example.value[: index + 1], example.place)
        if ids[: len(told)] != told or told[: len(asked)] != asked:
            raise DataError(
                f"{example.place}: this model's chat template changes earlier turns when later ones follow, so which "
                "tokens are the assistant's cannot be told; split the chat, or set completion_only to False"
            )
        learnt[len(asked) : len(told)] = [True] * (len(told) - len(asked))
    return Tokens(ids, learnt, example.place)


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], place: str = "", answer: bool = False) -> list[int]:
    """A chat through the tokenizer's template; with `answer`, up to where the assistant begins to write.

    Raises:
        DataError: there is no template, or it refuses this chat.
    """
    if tokenizer.chat_template is None:
        where = f"{place}: " if place else ""
        raise DataError(
            f"{where}this model's tokenizer has no chat template; give prompt and completion instead of messages"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise DataError(f"{place}: this model's chat template refuses the chat: {error}") from error

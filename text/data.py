"""Examples from a JSONL file, checked line by line: texts, prompts with completions, or chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError

_KEYS = {
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One thing to learn from, with the line that it comes from."""

    kind: str
    """`text`, `prompt` or `messages`."""
    value: Any
    """The text; (prompt, completion); or the list of messages."""
    place: str
    """`file.jsonl:12`, for messages about it."""


def read_examples(path: Path) -> list[Example]:
    """All examples of a file, which are of one kind. Empty lines are skipped.

    Raises:
        DataError: with file and line, what is wrong there and what was expected.
    """
    examples: list[Example] = []
    for place, line in _lines(path):
        example = _example(place, line)
        if examples and example.kind != examples[0].kind:
            first = examples[0]
            raise DataError(
                f"{place} has {_named(example.kind)}, but {first.place} has {_named(first.kind)}: "
                "a file holds examples of one kind; split it"
            )
        examples.append(example)
    if not examples:
        raise DataError(f"{path} holds no examples")
    return examples


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line ends
        if line.strip():
            yield f"{path}:{number}", line


def _example(place: str, line: str) -> Example:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(values, dict):
        raise DataError(f'{place} is no JSON object; expected one such as {{"text": "..."}}')
    kind = next((kind for kind, keys in _KEYS.items() if keys[0] in values), None)
    if kind is None:
        has = ", ".join(values) or "no keys"
        raise DataError(f"{place} has {has}; expected text, or prompt and completion, or messages")
    missing = [key for key in _KEYS[kind] if key not in values]
    if missing:
        raise DataError(f"{place} has a {kind} but no {', '.join(missing)}")
    if kind == "messages":
        return Example(kind, _messages(place, values["messages"]), place)
    for key in _KEYS[kind]:
        if not isinstance(values[key], str) or (not values[key] and key != "prompt"):
            raise DataError(f"{place}: {key} must be a text that is not empty, not {values[key]!r}")
    return Example(kind, values["text"] if kind == "text" else (values["prompt"], values["completion"]), place)


def _messages(place: str, messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of turns, each with a role and a content")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f"{place}: message {number} must have a role and a content, both texts")
        if turn["role"] not in _ROLES:
            raise DataError(
                f"{place}: message {number} has the role {turn['role']!r}; expected one of {', '.join(_ROLES)}"
            )
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{place}: no message is the assistant's, so there is nothing to learn")
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


def _named(kind: str) -> str:
    return " and ".join(_KEYS[kind])
